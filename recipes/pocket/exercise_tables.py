"""The phrasing tables of the exercises: what facts can be about, how they are stated, how they are asked for.

Every frame has ten or more phrasings, because a frame that is always worded alike is learnt as a string.  Adding a line
to a table is the way to make the exercises richer; the skills read the tables and know no sentence of their own.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Attribute:
    """One thing that can be known about a subject.  In the frames {s} is the subject and {v} the value."""

    name: str
    kind: str
    subjects: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]


def _attributes(table: str) -> tuple[Attribute, ...]:
    """Reads lines of `name | kind | subjects | statements | questions`; alternatives are separated by a semicolon.

    A line that ends in | goes on in the next one.
    """
    rows = []
    for line in table.strip().replace("|\n", "|").splitlines():
        name, kind, subjects, statements, questions = (part.strip() for part in line.split("|"))
        rows.append(
            Attribute(
                name, kind, subjects,
                tuple(filter(None, statements.split("; "))),
                tuple(filter(None, questions.split("; "))),
            )
        )
    return tuple(rows)


ATTRIBUTES = _attributes("""
opening time | clock | shop | {s} opens at {v}; The doors of {s} open at {v} |
    When does {s} open?; What time does {s} open?; From what time is {s} open?
closing time | clock | shop | {s} closes at {v}; {s} shuts its doors at {v} |
    When does {s} close?; Until when is {s} open?
rest day | weekday | shop | {s} is closed on {v}; There is nobody at {s} on {v} |
    On which day is {s} closed?; Which day does {s} rest?
owner | person | shop | {v} owns {s}; {s} belongs to {v} | Who owns {s}?; To whom does {s} belong?
phone number | phone | shop person | {s} can be called on {v}; Call {s} on {v} |
    What number do I call to reach {s}?; How can {s} be called?
e-mail address | email | shop person | Write to {s} at {v}; {s} reads mail at {v} |
    At which address does {s} read mail?; Where do I write to {s}?
manager | full_name | shop site | {v} manages {s}; {s} is run by {v} | Who manages {s}?; Who runs {s}?
price | price | thing machine trip course | {s} costs {v}; You can buy {s} for {v} |
    How much is {s}?; What does {s} cost?; How much do I pay for {s}?
colour | colour | thing machine | {s} is painted {v}; {s} comes in {v} |
    Which colour is {s}?; In what colour does {s} come?
material | material | thing | {s} is made of {v}; {v} was used for {s} |
    What is {s} made of?; Which material was used for {s}?
weight | measure | thing machine parcel | {s} weighs {v} | How heavy is {s}?; How much does {s} weigh?
maker | invented_title | thing machine game | {s} was made by {v}; {v} built {s} | Who made {s}?; Who built {s}?
serial number | code | machine thing | {s} carries the serial {v}; The serial on {s} reads {v} |
    Which serial does {s} carry?
part number | code | machine | The part for {s} is listed as {v}; Order {v} as the spare part of {s} |
    Under which number is the part for {s} listed?
warranty | duration | machine thing | {s} is covered for {v}; The warranty on {s} lasts {v} |
    How long is {s} covered?; For how long is {s} under warranty?
firmware version | version | machine | {s} runs firmware {v}; The newest firmware of {s} is {v} |
    Which firmware does {s} run?
power | measure | machine | {s} needs {v}; {s} draws {v} | How much does {s} need?
repair code | code | machine | {s} shows the code {v}; When {s} stops, it shows {v} | Which code does {s} show?
delivery date | date | parcel thing | {s} will be delivered on {v}; {s} arrives on {v} |
    When will {s} be delivered?; When does {s} arrive?; On what date does {s} arrive?
sender | person | parcel | {s} was sent by {v}; {v} sent {s} | Who sent {s}?; From whom is {s}?
courier | invented_title | parcel | {v} carries {s}; {s} travels with {v} | Who carries {s}?
tracking code | code | parcel | {s} can be followed with {v} | With what code can I follow {s}?
content | thing | parcel | {s} contains the {v}; Inside {s} there is the {v} |
    What is inside {s}?; What does {s} contain?
departure time | clock | trip | {s} leaves at {v}; {s} departs at {v} |
    When does {s} leave?; At what time does {s} depart?
platform | count | trip | {s} leaves from platform {v}; {s} starts at platform {v} |
    From which platform does {s} leave?
ticket code | code | trip game | The ticket for {s} has the code {v} | Which code is on the ticket for {s}?
guide | first_name | trip | {v} leads {s}; {s} is led by {v} | Who leads {s}?
travel time | duration | trip | {s} takes {v} | How long does {s} take?
teacher | full_name | course | {v} teaches {s}; {s} is taught by {v} | Who teaches {s}?; By whom is {s} taught?
room | code | course person | {s} is in room {v}; You will find {s} in room {v} |
    In which room is {s}?; Where do I find {s}?
start date | date | course trip game | {s} starts on {v}; {s} begins on {v} |
    When does {s} start?; On which date does {s} begin?
number of pupils | count | course | {v} pupils take {s}; {s} has {v} pupils | How many pupils take {s}?
level | count | game person | {s} is at level {v}; {s} has reached level {v} | Which level has {s} reached?
winner | first_name | game | {v} won {s}; {s} was won by {v} | Who won {s}?; By whom was {s} won?
number of players | count | game | {s} is for {v} players; {v} people can play {s} | How many can play {s}?
favourite food | food | person animal | {s} likes {v} best; {s} eats {v} every day |
    What does {s} like to eat?; What does {s} eat every day?
job | job | person | {s} works as a {v}; By trade {s} is a {v} | What does {s} do for a living?; As what does {s} work?
home town | town | person | {s} lives in {v}; {s} comes from {v} | Where does {s} live?; From where does {s} come?
birthday | date | person | {s} was born on {v}; {s} has a birthday on {v} |
    When was {s} born?; When is the birthday of {s}?
pet | animal | person | {s} keeps a {v}; At home {s} has a {v} | Which animal does {s} keep?; What pet does {s} have?
doctor | last_name | person | {s} is a patient of Doctor {v}; Doctor {v} looks after {s} | Who is the doctor of {s}?
appointment | clock | person | {s} has to be there at {v}; {s} is expected at {v} | At what time is {s} expected?
badge number | digits | person | {s} wears badge {v} | Which badge does {s} wear?
password | invented | person game | {s} uses the word {v} to get in; The word {v} opens the door for {s} |
    Which word does {s} use to get in?
seat | code | person | {s} sits in seat {v}; Seat {v} is taken by {s} | In which seat does {s} sit?
gift | thing | person | {s} got the {v}; The {v} was given to {s} | What did {s} get?; What was given to {s}?
friend | first_name | person animal | {s} is a friend of {v}; {v} is the best friend of {s} | Who is the friend of {s}?
place | site | thing person animal | {s} is in {v}; {s} was last seen in {v} | Where is {s}?; Where was {s} last seen?
owner | first_name | animal thing | {v} owns {s}; {s} belongs to {v} | Who owns {s}?; Whose is {s}?
age | duration | animal person | {s} is {v} old | How old is {s}?
speed | measure | animal machine | {s} covers {v} in an hour | How far does {s} get in an hour?
discount | percent | shop thing | {s} is sold with {v} off; There is {v} off on {s} | How much is taken off {s}?
rating | percent | shop game course | {v} of the visitors liked {s} | How many of the visitors liked {s}?
height | measure | site | {s} is {v} high | How high is {s}?
architect | full_name | site | {v} planned {s}; {s} was drawn by {v} | Who planned {s}?
motto | phrase | site shop | Above {s} one reads "{v}" | What does one read above {s}?
""")

# For every attribute, and for made-up ones: {a} is its name.
STATEMENTS = (
    "The {a} of {s} is {v}", "{s} has the {a} {v}", "For {s} the {a} is {v}", "{s}: {a} {v}", "The {a} for {s} is {v}",
    "{v} is the {a} of {s}", "As for {s}, its {a} is {v}", "The {a} given for {s} is {v}",
    "{s} is listed with the {a} {v}", "{v} was noted as the {a} of {s}", "The {a} of {s} was set to {v}",
    "We have {v} as the {a} of {s}",
)
QUESTIONS = (
    "What is the {a} of {s}?", "Which {a} does {s} have?", "Tell me the {a} of {s}.", "What {a} is given for {s}?",
    "Do you know the {a} of {s}?", "Find the {a} of {s}.", "I need the {a} of {s}.", "The {a} of {s}?",
    "{s}: what {a}?", "Could you look up the {a} of {s}?", "Please give me the {a} of {s}.",
    "What would be the {a} for {s}?", "Can you say what the {a} of {s} is?", "State the {a} of {s}.",
    "What does it say about the {a} of {s}?", "For {s}, what is the {a}?",
)
# When only one subject is spoken of, the question need not name it.
SHORT_QUESTIONS = (
    "What is the {a}?", "Which {a}?", "{a}?", "Tell me the {a}.", "What {a} is given?", "I need the {a}.",
    "And the {a}?", "Please find the {a}.", "Give the {a}.", "May I know the {a}?", "What's the {a} please?",
)
CONTEXT_LABELS = (
    "Context:", "Notes:", "Facts:", "Text:", "Passage:", "Document:", "Information:", "Record:", "Read this:",
    "Here is a text:", "Given:", "We know:", "From the file:", "Data:", "Memo:", "Page:", "Background:", "Source:",
)
QUESTION_LABELS = ("Question: ", "Q: ", "Question: ", "", "", "", "Task: ", "Asked: ", "Request: ", "Query: ")
VALUE_ONLY = (
    "Answer with the value only.", "Give only the answer.", "Just the value, please.",
    "Reply with the value and nothing else.", "Short answer.", "No full sentence.", "Only the value.",
    "Answer in as few words as you can.", "Only what was asked.", "Say just the answer.", "Nothing but the answer.",
)
FULL_SENTENCE = (
    "Answer with the sentence that says it.", "Quote the sentence.", "Copy the sentence that tells it.",
    "Reply with the line it stands in.", "Give the whole sentence.", "Repeat the sentence that answers this.",
    "Use the sentence from the text.", "Answer in the words of the text.", "Cite the sentence.",
    "Which sentence says so? Copy it.", "Full sentence from the text, please.",
)
DEFAULT_MISSING = "The text does not say."
MISSING_RULES = (
    'If it is not there, say "{m}"', 'If the text does not tell, answer "{m}"', 'Not given? Then reply "{m}"',
    'When you cannot find it, write "{m}"', 'Say "{m}" if it is missing.', 'Otherwise answer "{m}"',
    'If you do not know, say "{m}"', 'If nothing is said about it, reply with "{m}"',
    'Answer "{m}" if that is not stated.', 'No answer in the text means: "{m}"',
    'Reply "{m}" when it cannot be known.',
)
MISSING_ANSWERS = (
    "unknown", "not stated", "I do not know.", "not found", "n/a", "none", "no answer", "Sorry, that is not here.",
    "missing", "It is not in the text.", "I cannot find that.", "nothing", "no data", "?", "That is not given.",
)

# Fields of records: label, kind, keys, and sentences in which {v} is the value; for extraction and tools.
FIELDS = {
    "name": (
        "person", "name customer full_name client person contact",
        "My name is {v}.; I am {v}.; This is {v} writing.; {v} here.; The client is {v}.",
    ),
    "email": (
        "email", "email mail email_address e_mail contact_email",
        "My e-mail is {v}.; Write to me at {v}.; Reach me at {v}.; Please answer to {v}.",
    ),
    "phone": (
        "phone", "phone phone_number telephone tel mobile",
        "My phone number is {v}.; Call me on {v}.; I can be reached on {v}.",
    ),
    "order number": (
        "code", "order_id order order_number order_no reference",
        "My order number is {v}.; It is about order {v}.; The order is {v}.; See order {v}.",
    ),
    "serial number": (
        "code", "serial serial_number serial_no device_id unit",
        "The serial number is {v}.; It carries the serial {v}.; Its serial reads {v}.",
    ),
    "booking code": (
        "code", "booking booking_id booking_code reservation",
        "The booking code is {v}.; I booked under {v}.; The reservation is {v}.",
    ),
    "date": (
        "date", "date day on_date when due_date",
        "The date is {v}.; It was on {v}.; It should be on {v}.; We said {v}.",
    ),
    "time": ("clock", "time at start_time hour", "The time is {v}.; It starts at {v}.; Come at {v}.; We meet at {v}."),
    "city": (
        "town", "city town place location destination",
        "The city is {v}.; I live in {v}.; It goes to {v}.; We are in {v}.",
    ),
    "item": (
        "thing", "item product article goods thing",
        "The item is a {v}.; I bought the {v}.; It is about the {v}.; We want the {v}.",
    ),
    "quantity": (
        "count", "quantity amount count number qty",
        "The quantity is {v}.; We need {v} of them.; There are {v} pieces.; Send {v}.",
    ),
    "price": ("price", "price cost total fee", "The price is {v}.; It costs {v}.; I paid {v}.; The bill says {v}."),
    "colour": ("colour", "colour color shade", "The colour is {v}.; It should be {v}.; I want it in {v}."),
    "material": ("material", "material fabric made_of", "The material is {v}.; It is made of {v}."),
    "room": ("code", "room room_number room_id", "The room is {v}.; We sit in room {v}."),
    "weekday": ("weekday", "weekday day_of_week day", "It is on a {v}.; The day is {v}.; {v} suits me."),
    "job": ("job", "job profession role position", "The job is {v}.; They need a {v}.; I work as a {v}."),
    "version": ("version", "version release software_version", "The version is {v}.; It runs version {v}."),
    "animal": ("animal", "animal pet species", "The animal is a {v}.; We bring the {v}.; It is for a {v}."),
    "ticket": ("digits", "ticket ticket_id case case_id", "The ticket is {v}.; My case is {v}."),
    "code word": ("invented", "code_word password keyword secret", "The code word is {v}.; Say {v} at the door."),
    "topic": ("phrase", "topic subject title text", 'The topic is "{v}".; It is called "{v}".; I named it "{v}".'),
    "duration": ("duration", "duration period length", "The duration is {v}.; It lasts {v}.; It takes {v}."),
    "dish": ("food", "dish meal food", "The dish is {v}.; I would like {v}."),
}
FIELDS = {
    label: (kind, tuple(keys.split()), tuple(sentences.split("; ")))
    for label, (kind, keys, sentences) in FIELDS.items()
}

TOOL_VERBS = {
    "get": ("get", "look up", "give me", "show me", "fetch"),
    "find": ("find", "search for", "locate"),
    "create": ("create", "make", "set up", "add"),
    "cancel": ("cancel", "call off", "stop"),
    "update": ("update", "change", "adjust"),
    "delete": ("delete", "remove", "erase"),
    "send": ("send", "mail out", "dispatch"),
    "book": ("book", "reserve"),
    "check": ("check", "verify"),
    "open": ("open", "start"),
    "close": ("close", "end"),
    "list": ("list", "enumerate"),
    "print": ("print", "print out"),
    "track": ("track", "follow"),
    "move": ("move", "shift"),
    "play": ("play", "put on"),
    "pay": ("pay", "settle"),
    "rate": ("rate", "score"),
    "lock": ("lock", "secure"),
    "copy": ("copy", "duplicate"),
    "order": ("order", "buy"),
    "report": ("report", "announce"),
}
TOOL_NOUNS = ["account", "address", "alarm", "answer", "article", "bill", "booking", "calendar", "call", "card", "case", "channel", "contract", "coupon", "course", "delivery", "device", "document", "door", "draft", "engine", "entry", "event", "file", "flight", "form", "game", "gift", "guest", "image", "invoice", "item", "job", "journey", "key", "lamp", "lesson", "letter", "level", "loan", "lock", "log", "machine", "map", "match", "meal", "meeting", "member", "menu", "message", "note", "order", "package", "page", "parcel", "part", "payment", "permit", "photo", "plan", "playlist", "policy", "price", "profile", "project", "quote", "receipt", "record", "refund", "reminder", "rental", "repair", "report", "reservation", "review", "ride", "robot", "room", "route", "sample", "schedule", "seat", "sensor", "session", "shipment", "signal", "song", "stock", "story", "subscription", "survey", "table", "task", "team", "ticket", "timer", "tour", "train", "transfer", "trip", "user", "vehicle", "video", "visit", "voucher"]
REQUESTS = (
    "{V} the {n}.", "Please {v} the {n}.", "Can you {v} the {n}?", "I want you to {v} the {n}.",
    "Could you {v} the {n} for me?", "We need to {v} the {n}.", "{V} my {n}, please.", "Would you {v} a {n}?",
    "I would like to {v} the {n}.", "Help me {v} the {n}.", "It is time to {v} the {n}.", "{V} this {n} now.",
    "Let us {v} the {n}.",
)
TEMPLATES = (
    "Dear {0}, your {1} ships on {2}.", "Hello {0}, see you at {1} in {2}.", "{0} ordered {1} for {2}.",
    "Ticket {0}: {1}, {2}.", "To: {0}\nSubject: {1}", "[{0}] {1} -> {2}", "Thank you, {0}! We sent {1} to {2}.",
    "{0} / {1} / {2}", "Name: {0}; code: {1}.", "Good news, {0}: the {1} is ready.", "Reminder for {0}: {1} at {2}.",
    "We met {0} in {1} and bought {2}.", "<{0}> {1} </{0}>", "Invoice {0} for {1}, due {2}.", "{0} says: {1}",
    "Meet {0} on {1}, bring {2}.", "The {1} belongs to {0}.", "{2} was paid by {0} on {1}.",
    "Welcome, {0}! Your room is {1} and breakfast is at {2}.", "Lost: {0}. Found in {1} by {2}.",
    "{0} is number {1} on the list.", "From {0} to {1} it takes {2}.", "Note to {0}: keep {1} away from {2}.",
    "Parcel {0} left {1} on {2}.",
)
DEFINITIONS = dict(
    line.split(": ")
    for line in """
apple: a round fruit that grows on trees
baker: a person who makes bread
bridge: a way built over water or a road
butter: a soft yellow food made from cream
candle: a stick of wax that burns to give light
castle: a large old building with strong walls
chair: a seat for one person
clock: a thing that shows the time
cloud: a white or grey mass of drops in the sky
coin: a small round piece of metal money
desk: a table for reading and writing
doctor: a person who treats sick people
door: a moving board that closes a room
farmer: a person who works on a farm
fire: the light and heat of something burning
forest: a large area full of trees
glove: a cover for the hand
hammer: a tool for hitting nails
harbour: a safe place for ships
honey: a sweet food made by bees
hospital: a place where sick people are treated
island: land with water all around it
key: a small tool that opens a lock
knife: a tool with a blade for cutting
ladder: a frame with steps for climbing
lake: a large area of water with land around it
lamp: a thing that gives light
letter: a written message sent to someone
library: a place where books are kept
map: a drawing that shows where places are
market: a place where people buy and sell
mirror: a glass in which you see yourself
moon: the round body that goes around the earth
mountain: a very high hill
needle: a thin pointed tool for sewing
night: the dark time between two days
ocean: a very large area of salt water
oven: a closed box for baking food
parcel: a thing wrapped up to be sent
pencil: a thin tool for writing and drawing
pilot: a person who flies a plane
pocket: a small bag sewn into clothes
rain: water that falls from clouds
river: a long stream of water that flows to the sea
road: a way for cars and carts
roof: the cover on top of a house
rope: a thick strong string
sailor: a person who works on a ship
school: a place where children learn
shoe: a cover for the foot
snow: soft white ice that falls from the sky
spoon: a tool for eating soup
star: a far light in the night sky
storm: very bad weather with strong wind
street: a road in a town
summer: the warmest part of the year
table: a flat board on legs
teacher: a person who helps others to learn
tent: a house of cloth for camping
ticket: a paper that lets you travel or go in
tower: a tall narrow building
train: a row of cars that runs on rails
tree: a tall plant made of wood
umbrella: a cover that keeps off the rain
valley: low land between hills
village: a very small town
wallet: a small case for money
watch: a small clock worn on the arm
window: an opening with glass in a wall
winter: the coldest part of the year
wolf: a wild animal like a dog
""".strip().splitlines()
)
OPPOSITES = dict(
    pair.split("-")
    for pair in ["big-small", "hot-cold", "old-young", "early-late", "high-low", "long-short", "open-closed", "full-empty", "light-dark", "fast-slow", "strong-weak", "wet-dry", "hard-soft", "rich-poor", "loud-quiet", "first-last", "near-far", "left-right", "up-down", "day-night", "good-bad", "happy-sad", "clean-dirty", "thick-thin", "wide-narrow", "new-worn", "deep-shallow", "buy-sell", "give-take", "start-stop", "push-pull", "win-lose", "come-go", "ask-answer", "north-south", "east-west", "before-after", "inside-outside", "above-below", "always-never", "more-less", "true-false"]
)
