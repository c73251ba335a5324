"""Random values for the exercises: words, names, codes, dates, and the table of fields that texts are made of.

Why so many pools and so many made-up words: a model of 7 million parameters would rather memorise a list of a hundred
names than learn to copy.  Values that are drawn from a space too large to memorise leave copying as the only way to
a low loss.  Standard library only, so that the exercises can be made on any machine.
"""

from __future__ import annotations

import random

FIRST_NAMES = ["Ada", "Alma", "Amir", "Ana", "Anders", "Anton", "Aria", "Asha", "Astrid", "Ben", "Bianca", "Boris", "Bruno", "Cara", "Carlos", "Celia", "Chen", "Clara", "Colin", "Cora", "Dalia", "Dana", "Daniel", "David", "Dev", "Diego", "Dina", "Dora", "Edda", "Edgar", "Ela", "Elena", "Eli", "Elsa", "Emil", "Emma", "Enzo", "Erik", "Esme", "Ester", "Eva", "Ezra", "Fabio", "Farah", "Felix", "Fiona", "Flora", "Frank", "Freya", "Gabe", "Gemma", "George", "Gina", "Greta", "Gus", "Hana", "Hannah", "Harald", "Hassan", "Hazel", "Helen", "Henry", "Hugo", "Ian", "Ida", "Igor", "Ilse", "Imani", "Inga", "Iris", "Isla", "Ivan", "Ivy", "Jack", "Jamal", "Jana", "Jane", "Jasper", "Joan", "Joel", "John", "Jonas", "Jorge", "Judith", "Julia", "Kai", "Karim", "Karl", "Kate", "Kemal", "Kenji", "Kira", "Klaus", "Lara", "Lars", "Laura", "Lea", "Lena", "Leo", "Liam", "Lina", "Lola", "Lucia", "Luis", "Luka", "Lydia", "Maja", "Malik", "Mara", "Marco", "Maria", "Mark", "Marta", "Mary", "Mateo", "Maya", "Mei", "Mila", "Mina", "Mira", "Mona", "Nadia", "Naomi", "Nela", "Nico", "Nils", "Nina", "Noah", "Nora", "Olaf", "Olga", "Omar", "Oscar", "Otto", "Pablo", "Paul", "Pavel", "Petra", "Pia", "Priya", "Quinn", "Rafael", "Rania", "Raul", "Ravi", "Rita", "Robin", "Rosa", "Ruben", "Ruth", "Sam", "Sara", "Selma", "Sofia", "Sonja", "Stefan", "Suki", "Tamar", "Tara", "Theo", "Tim", "Tina", "Tomas", "Toby", "Uma", "Una", "Vera", "Viktor", "Wanda", "Wei", "Will", "Xenia", "Yara", "Yusuf", "Zara", "Zoe"]
LAST_NAMES = ["Abbott", "Adler", "Almeida", "Baker", "Banks", "Barros", "Becker", "Bell", "Berg", "Blake", "Bloom", "Brandt", "Brook", "Burns", "Carter", "Castle", "Chan", "Clark", "Cole", "Cook", "Costa", "Cross", "Dahl", "Dale", "Diaz", "Dixon", "Drake", "Dunn", "Ellis", "Falk", "Farmer", "Fisher", "Flint", "Ford", "Foster", "Frost", "Garcia", "Gill", "Grant", "Gray", "Green", "Hale", "Hall", "Hansen", "Hart", "Hayes", "Hill", "Holt", "Hunt", "Ito", "Jensen", "Jones", "Kaya", "Keller", "Khan", "Kim", "King", "Klein", "Kumar", "Lake", "Lang", "Larsen", "Lee", "Lima", "Lopez", "Lund", "Marsh", "Mason", "Meyer", "Mills", "Moon", "Moore", "Nagy", "Nash", "Novak", "Olsen", "Park", "Patel", "Perez", "Pike", "Poole", "Price", "Quist", "Reed", "Rossi", "Roth", "Rowe", "Sato", "Shaw", "Silva", "Singh", "Snow", "Stone", "Strand", "Swift", "Tanaka", "Tate", "Thorn", "Torres", "Vance", "Vega", "Vogel", "Wade", "Walsh", "Ward", "Webb", "Weiss", "West", "Wolf", "Wood", "Young", "Zhou"]
NOUNS = ["anchor", "apple", "arrow", "atlas", "bag", "ball", "banner", "barrel", "basket", "bath", "battery", "bead", "bell", "belt", "bench", "bicycle", "blanket", "boat", "book", "boot", "bottle", "bowl", "box", "bracelet", "brick", "bridge", "broom", "brush", "bucket", "button", "cabinet", "cable", "camera", "candle", "cap", "card", "carpet", "cart", "case", "chain", "chair", "chest", "clock", "cloth", "coat", "coin", "collar", "comb", "compass", "cord", "cork", "crate", "crown", "cup", "curtain", "cushion", "desk", "dish", "doll", "door", "dress", "drill", "drum", "envelope", "fan", "feather", "fence", "file", "flag", "flask", "flute", "folder", "fork", "frame", "gate", "glass", "globe", "glove", "guitar", "hammer", "handle", "harp", "hat", "heater", "helmet", "hinge", "hook", "horn", "hose", "jacket", "jar", "jug", "kettle", "key", "kite", "knife", "knot", "label", "ladder", "lamp", "lantern", "leaf", "ledger", "lens", "letter", "lid", "lock", "magnet", "map", "mask", "mat", "medal", "mirror", "mug", "nail", "napkin", "needle", "net", "notebook", "oar", "oven", "paddle", "painting", "pan", "panel", "paper", "parcel", "pen", "pencil", "piano", "picture", "pillow", "pin", "pipe", "plate", "plug", "pocket", "pot", "printer", "puzzle", "quilt", "rack", "radio", "rake", "ribbon", "ring", "rope", "rug", "ruler", "sack", "saddle", "sail", "saw", "scale", "scarf", "scissors", "screen", "screw", "shelf", "shell", "shield", "ship", "shirt", "shoe", "shovel", "sign", "sink", "skirt", "sled", "sock", "sofa", "spoon", "spring", "stamp", "statue", "stick", "stool", "stove", "string", "suitcase", "sword", "table", "tent", "ticket", "tile", "tool", "torch", "towel", "toy", "tray", "trumpet", "tunnel", "umbrella", "vase", "vest", "violin", "wagon", "wallet", "watch", "wheel", "whistle", "window", "wire", "wrench", "zipper"]
ADJECTIVES = ["amber", "ancient", "blue", "bold", "brass", "bright", "broken", "brown", "calm", "carved", "cheap", "clean", "cold", "copper", "cracked", "crooked", "dark", "deep", "dry", "dull", "dusty", "early", "empty", "fancy", "fine", "flat", "folded", "foreign", "fresh", "full", "gentle", "giant", "glass", "golden", "grand", "green", "grey", "hard", "heavy", "hidden", "high", "hollow", "huge", "iron", "ivory", "large", "late", "light", "little", "long", "loose", "lost", "loud", "low", "narrow", "neat", "new", "noisy", "odd", "old", "open", "orange", "pale", "paper", "patched", "pink", "plain", "polished", "proud", "purple", "quick", "quiet", "rare", "red", "rough", "round", "royal", "rusty", "sharp", "short", "shiny", "silent", "silver", "simple", "slim", "slow", "small", "smooth", "soft", "solid", "spare", "square", "steep", "stiff", "strange", "striped", "strong", "sweet", "tall", "thick", "thin", "tiny", "torn", "warm", "wet", "white", "wide", "wild", "wooden", "yellow", "young"]
ANIMALS = ["ant", "badger", "bat", "bear", "beaver", "bee", "bird", "camel", "cat", "cow", "crab", "crane", "crow", "deer", "dog", "dolphin", "donkey", "dove", "duck", "eagle", "eel", "falcon", "fox", "frog", "goat", "goose", "hare", "hawk", "hen", "heron", "horse", "jackal", "lamb", "lion", "lizard", "lynx", "mole", "monkey", "moose", "moth", "mouse", "mule", "newt", "otter", "owl", "ox", "panda", "parrot", "penguin", "pig", "pony", "rabbit", "rat", "raven", "robin", "salmon", "seal", "shark", "sheep", "snail", "snake", "sparrow", "spider", "squirrel", "stork", "swan", "tiger", "toad", "trout", "turtle", "whale", "wolf", "wren", "zebra"]
FOODS = ["almond", "apricot", "bacon", "banana", "bean", "beet", "bread", "broth", "butter", "cabbage", "cake", "carrot", "celery", "cheese", "cherry", "chicken", "corn", "cream", "cucumber", "date", "egg", "fig", "flour", "garlic", "ginger", "grape", "ham", "honey", "jam", "leek", "lemon", "lentil", "lettuce", "lime", "mango", "melon", "milk", "mint", "mushroom", "noodle", "nut", "oat", "olive", "onion", "orange", "parsley", "pasta", "pea", "peach", "pear", "pepper", "pie", "plum", "potato", "pumpkin", "radish", "rice", "salad", "salt", "sauce", "soup", "spinach", "sugar", "syrup", "tea", "toast", "tomato", "turnip", "walnut", "yogurt"]
COLOURS = ["black", "blue", "bronze", "brown", "cream", "crimson", "gold", "gray", "green", "grey", "ivory", "orange", "pink", "purple", "red", "silver", "teal", "violet", "white", "yellow"]
MATERIALS = ["brass", "bronze", "canvas", "clay", "copper", "cork", "cotton", "felt", "glass", "gold", "iron", "leather", "linen", "marble", "oak", "paper", "pine", "plastic", "rubber", "sand", "silk", "silver", "slate", "steel", "stone", "straw", "tin", "velvet", "wax", "wood", "wool"]
SITES = ["airport", "attic", "bakery", "bank", "barn", "beach", "cafe", "canal", "castle", "cave", "cellar", "chapel", "church", "cinema", "clinic", "corner", "court", "dock", "factory", "farm", "ferry", "field", "forest", "garage", "garden", "harbour", "hill", "hospital", "hotel", "island", "kitchen", "lake", "library", "lighthouse", "market", "meadow", "mill", "mine", "museum", "office", "orchard", "palace", "park", "pier", "port", "school", "shop", "square", "stable", "stadium", "station", "street", "studio", "temple", "theatre", "tower", "tunnel", "valley", "village", "workshop"]
JOBS = ["actor", "artist", "baker", "barber", "builder", "butcher", "captain", "carpenter", "clerk", "cook", "dancer", "dentist", "doctor", "driver", "farmer", "fisher", "gardener", "guard", "guide", "judge", "lawyer", "librarian", "mason", "mechanic", "merchant", "miller", "nurse", "painter", "pilot", "plumber", "poet", "porter", "printer", "sailor", "singer", "smith", "soldier", "student", "tailor", "teacher", "waiter", "weaver", "writer"]
TRADES = ["Bakery", "Bank", "Books", "Bikes", "Cafe", "Clinic", "Cinema", "Dental", "Diner", "Fabrics", "Florist", "Foods", "Garage", "Gallery", "Garden", "Gym", "Hardware", "Hotel", "Inn", "Laundry", "Library", "Market", "Museum", "Music", "Optics", "Pharmacy", "Pool", "Print", "Records", "School", "Shoes", "Stores", "Studio", "Tailors", "Theatre", "Tools", "Toys", "Travel", "Vets", "Workshop"]
MACHINES = ["blender", "camera", "charger", "cutter", "drill", "dryer", "engine", "fan", "freezer", "furnace", "heater", "lift", "loom", "mixer", "motor", "mower", "oven", "press", "printer", "pump", "radio", "robot", "router", "saw", "scanner", "sensor", "sewing-machine", "tractor", "turbine", "washer", "welder"]
SUBJECTS = ["art", "biology", "chemistry", "chess", "choir", "cooking", "dance", "drama", "drawing", "first-aid", "French", "geography", "geometry", "German", "history", "Latin", "maths", "music", "painting", "physics", "pottery", "reading", "sewing", "singing", "Spanish", "swimming", "writing", "yoga"]
WEEKDAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December"]
TOWN_ENDINGS = ["bay", "berg", "borough", "bridge", "brook", "burn", "bury", "by", "church", "cliff", "dale", "den", "field", "ford", "gate", "ham", "haven", "hill", "holm", "hurst", "land", "leigh", "ley", "mere", "mill", "moor", "mouth", "port", "pool", "ridge", "shaw", "side", "stead", "stow", "ton", "vale", "view", "ville", "wick", "wood", "worth"]
MAIL_ENDINGS = ["com", "org", "net", "info", "eu", "co.uk", "io", "de", "shop", "example"]
ONSETS = ["b", "bl", "br", "c", "ch", "cl", "cr", "d", "dr", "f", "fl", "fr", "g", "gl", "gr", "h", "j", "k", "kl", "kr", "l", "m", "n", "p", "pl", "pr", "qu", "r", "s", "sc", "sh", "sk", "sl", "sn", "sp", "st", "str", "sw", "t", "th", "tr", "tw", "v", "w", "wh", "y", "z"]
VOWELS = ["a", "a", "a", "e", "e", "e", "i", "i", "i", "o", "o", "o", "u", "u", "ai", "ea", "ee", "ie", "oa", "oo", "ou"]
CODAS = [
    "", "", "", "", "", "l", "m", "n", "n", "r", "r", "s", "t", "x", "ck", "d", "ft", "g", "k", "ld", "ll", "nd", "nt",
    "p", "rk", "rn", "sk", "st", "th",
]
UPPER, LOWER, DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz", "0123456789"
ALNUM, HEXADECIMAL = UPPER + DIGITS, DIGITS + "abcdef"
# In a pattern A is an upper-case letter, a a lower-case one, 9 a digit, * either of them, h a hexadecimal digit.
PLAIN_PATTERNS = ["AA-9999", "AA-9999", "AA-9999", "AA-999", "AAA-999", "AAA-9999", "A-999", "A9999", "A-99999", "AA9999", "AA999999", "99-AA-99", "9999-AA", "99999", "999999", "9999999", "AA/999", "A9-A9-A9", "****", "*****", "******", "***-***", "****-****", "AA-99-AA", "AAA99", "9A9A9A", "aa-999", "aaa-9999", "aa99", "a9999", "hhhhhh", "hhhhhhhh", "AA-999-A", "AAA-999-99", "AA.999", "AA_9999", "9-99-999", "A99-999", "AAAA-99", "AAAA-9999"]
PREFIXES = ["INV", "ORD", "REF", "TKT", "SN", "ID", "PN", "BK", "LOT", "CASE", "DOC", "RMA", "PO", "ACC", "UNIT", "KEY", "TAG", "PASS", "ROOM", "GATE"]


class Dice:
    """A seeded source of choices.  Its methods are written for speed: `random.choice` costs three times as much."""

    def __init__(self, seed: int):
        self._random = random.Random(seed)
        self.unit = self._random.random
        self.shuffle = self._random.shuffle

    def pick(self, sequence):
        return sequence[int(self.unit() * len(sequence))]

    def chance(self, probability: float) -> bool:
        return self.unit() < probability

    def between(self, low: int, high: int) -> int:
        """An integer in low..high, both included."""
        return low + int(self.unit() * (high - low + 1))

    def sample(self, sequence, count: int) -> list:
        return self._random.sample(sequence, count)

    def shuffled(self, sequence) -> list:
        items = list(sequence)
        self.shuffle(items)
        return items

    def distinct(self, make, count: int) -> list[str]:
        """`count` different results of make()."""
        found: dict[str, None] = {}
        while len(found) < count:
            found[make()] = None
        return list(found)

    def from_pattern(self, pattern: str) -> str:
        pools = {"A": UPPER, "a": LOWER, "9": DIGITS, "*": ALNUM, "h": HEXADECIMAL}
        pick = self.pick
        return "".join([pick(pools[mark]) if mark in pools else mark for mark in pattern])

    # words

    def syllable(self) -> str:
        return self.pick(ONSETS) + self.pick(VOWELS) + self.pick(CODAS)

    def invented(self) -> str:
        """A made-up word in lower case: brondel, skivo, tharn."""
        word = self.syllable() if self.chance(0.12) else self.pick(ONSETS) + self.pick(VOWELS) + self.syllable()
        return word if self.chance(0.85) else self.pick(ONSETS) + self.pick(VOWELS) + word

    def invented_title(self) -> str:
        return self.invented().capitalize()

    def word(self) -> str:
        draw = self.unit()
        if draw < 0.3:
            return self.pick(NOUNS)
        if draw < 0.55:
            return self.pick(self.pick((ANIMALS, FOODS, SITES, COLOURS, MATERIALS)))
        return self.invented()

    def words(self, low: int = 3, high: int = 6) -> list[str]:
        """Different words, of one pool or of several, as a list to sort, count or print."""
        count = self.between(low, high)
        draw = self.unit()
        if draw < 0.45:
            return self.sample(self.pick((NOUNS, ANIMALS, FOODS, SITES, MATERIALS, COLOURS, JOBS)), count)
        if draw < 0.6:
            return self.sample(FIRST_NAMES, count)
        return self.distinct(self.pick((self.word, self.invented, self.invented_title, self.code)), count)

    def thing(self) -> str:
        draw = self.unit()
        if draw < 0.6:
            return f"{self.pick(ADJECTIVES)} {self.pick(NOUNS)}"
        return self.pick(NOUNS) if draw < 0.8 else f"{self.invented()} {self.pick(NOUNS)}"

    def phrase(self) -> str:
        count = self.between(2, 5)
        return " ".join([self.word() if self.chance(0.6) else self.pick(ADJECTIVES) for _ in range(count)])

    # people and places

    def first_name(self) -> str:
        return self.pick(FIRST_NAMES) if self.chance(0.6) else self.invented_title()

    def last_name(self) -> str:
        return self.pick(LAST_NAMES) if self.chance(0.6) else self.invented_title()

    def full_name(self) -> str:
        return f"{self.first_name()} {self.last_name()}"

    def person(self) -> str:
        return self.first_name() if self.chance(0.5) else self.full_name()

    def town(self) -> str:
        if self.chance(0.3):
            return self.invented_title()
        stem = self.syllable().capitalize() if self.chance(0.6) else self.pick(NOUNS).capitalize()
        return stem + self.pick(TOWN_ENDINGS)

    def site(self) -> str:
        return f"the {self.pick(SITES)}" if self.chance(0.5) else f"the {self.pick(ADJECTIVES)} {self.pick(SITES)}"

    def email(self) -> str:
        joiner = self.pick((".", ".", "_", "-", ""))
        local = self.first_name() + (joiner + self.last_name() if self.chance(0.6) else "")
        if self.chance(0.25):
            local += str(self.between(1, 99))
        domain = self.invented() if self.chance(0.7) else f"{self.pick(NOUNS)}{self.pick(SITES)}"
        return f"{local}@{domain}.{self.pick(MAIL_ENDINGS)}".lower()

    # codes and numbers

    def code(self) -> str:
        if self.chance(0.75):
            return self.from_pattern(self.pick(PLAIN_PATTERNS))
        return self.pick(PREFIXES) + self.from_pattern(
            self.pick(("-9999", "-99999", "999", "-9999-99", "-AA99", " 999"))
        )

    def digits(self) -> str:
        return self.from_pattern("99999999"[: self.between(3, 8)])

    def phone(self) -> str:
        return self.from_pattern(
            self.pick(("555 0999", "0999 999 999", "+99 99 9999 999", "99-99-99-99", "999-9999", "(099) 999 99"))
        )

    def version(self) -> str:
        text = f"{self.between(0, 20)}.{self.between(0, 30)}"
        if self.chance(0.6):
            text += f".{self.between(0, 40)}"
        return text if self.chance(0.7) else "v" + text

    def count(self) -> str:
        return str(self.between(2, self.pick((9, 20, 60, 300, 5000))))

    def price(self) -> str:
        amount = str(self.between(1, 900)) if self.chance(0.4) else f"{self.between(1, 400)}.{self.between(0, 99):02d}"
        return self.pick(("${}", "£{}", "€{}", "{} euros", "{} dollars", "{} EUR", "{} crowns", "{} pounds")).format(
            amount
        )

    def duration(self) -> str:
        return f"{self.between(2, 60)} {self.pick(('days', 'months', 'weeks', 'years', 'hours', 'minutes'))}"

    def measure(self) -> str:
        amount = str(self.between(2, 400)) if self.chance(0.6) else f"{self.between(0, 40)}.{self.between(1, 9)}"
        return f"{amount} {self.pick(('kg', 'm', 'cm', 'mm', 'litres', 'km', 'g', 'W', 'volts', 'metres', 'miles'))}"

    def percent(self) -> str:
        return f"{self.between(1, 99)}%" if self.chance(0.6) else f"{self.between(1, 99)} percent"

    # times

    def clock(self) -> str:
        hour, minute = self.between(0, 23), self.pick((0, 15, 30, 45, self.between(0, 59), self.between(0, 59)))
        if self.chance(0.6):
            return f"{hour:02d}:{minute:02d}"
        return (
            f"{hour % 12 + 1}:{minute:02d} {self.pick(('am', 'pm'))}"
            if self.chance(0.6)
            else f"{hour % 12 + 1} {self.pick(('am', 'pm'))}"
        )

    def date(self) -> str:
        day, month, year = self.between(1, 28), self.between(1, 12), self.between(1990, 2039)
        draw = self.unit()
        if draw < 0.25:
            return f"{day} {MONTHS[month - 1]}"
        if draw < 0.4:
            return f"{MONTHS[month - 1]} {day}"
        if draw < 0.6:
            return f"{year}-{month:02d}-{day:02d}"
        if draw < 0.75:
            return f"{day} {MONTHS[month - 1]} {year}"
        return f"{self.pick(WEEKDAYS)} {day} {MONTHS[month - 1]}" if draw < 0.85 else f"{day:02d}/{month:02d}/{year}"

    def weekday(self) -> str:
        return self.pick(WEEKDAYS)

    def colour(self) -> str:
        return self.pick(COLOURS)

    def material(self) -> str:
        return self.pick(MATERIALS)

    def job(self) -> str:
        return self.pick(JOBS)

    def food(self) -> str:
        return self.pick(FOODS) if self.chance(0.6) else f"{self.pick(FOODS)} {self.pick(FOODS)}"

    def animal(self) -> str:
        return self.pick(ANIMALS)

    def value(self, kind: str) -> str:
        """A value of one of the kinds named in the tables, for example "clock" or "code"."""
        return getattr(self, kind)()
