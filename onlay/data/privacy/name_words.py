"""The words that the name heuristic knows: given names of many countries, written for this project, without a claim to be whole;
and words with a capital that are no names."""

from __future__ import annotations

GIVEN_NAMES = """
Aaron Abby Abigail Abraham Adam Adrian Agnes Aidan Aileen Alan Albert Alejandra Alex Alexa Alexander Alexandra Alexis Alfred Alice
Alicia Alison Allison Alyssa Amanda Amelia Amy Ana Andrea Andrew Andy Angela Angelica Anita Ann Anna Anne Annie Anthony Antonio
Ariana Arnold Arthur Ashley Audrey Ava Barbara Barry Beatrice Becky Ben Benjamin Bernard Beth Bethany Betty Beverly Bob Bobby Bonnie
Brad Bradley Brandon Brenda Brendan Brett Brian Brianna Bridget Brittany Bruce Bryan Caitlin Caleb Calvin Cameron Carl Carla Carlos
Carmen Carol Caroline Carolyn Carrie Catherine Cathy Cecilia Charles Charlie Charlotte Chelsea Cheryl Chloe Chris Christian
Christina Christine Christopher Cindy Claire Clara Clarence Claudia Cody Colin Connor Courtney Craig Crystal Curtis Cynthia Daisy
Damian Dan Daniel Danielle Danny Darren Daryl Dave David Deborah Debra Denise Dennis Derek Diana Diane Dominic  Donald Donna Doris
Dorothy Doug Douglas Duncan Dustin Dylan Earl Eddie Edgar Edith Edward Edwin Eileen Elaine Eleanor Elena Eli Elijah Elizabeth Ella
Ellen Emily Emma Eric Erica Erik Erin Ernest Esther Ethan Eugene Eva Evan Evelyn Felicia Felix Fiona Florence Frances Francis Frank
Franklin Fred Frederick Gabriel Gabrielle Gail Gareth Gary Gavin Geoffrey George Gerald Geraldine Gerard Gina Gladys Glenn Gloria
Gordon Graham Greg Gregory Gwen Hannah Harold Harriet Harry Harvey Hazel Heather Heidi Helen Henry Herbert Holly Howard Hugh Ian Ida
Irene Isaac Isabel Isabella Isaiah Ivan Jack Jackie Jackson Jacob Jacqueline Jake James Jamie Jan Jane Janet Janice Jared Jason
Jasmine Jay Jean Jeff Jeffrey Jen Jenna Jennifer Jenny Jeremy Jerome Jerry Jesse Jessica Jill Jim Jimmy Joan Joann Joanna Joanne Joe
Joel John Johnny Jon Jonathan Jorge Jose Joseph Josephine Josh Joshua Joyce Juan Judith Judy Julia Julian Juliana Julie Justin Kaitlyn
Karen Karl Kate Katelyn Katherine Kathleen Kathryn Kathy Katie Kayla Keith Kelly Ken Kenneth Kevin Kim Kimberly Kristen Kristin
Kristina Kurt Kyle Lara Larry Laura Lauren Laurie Lawrence Leah Lee Leo Leon Leonard Leslie Lewis Liam Lillian Lily Linda Lisa Liz
Lloyd Logan Lois Lori Lorraine Louis Louise Lucas Lucy Luis Luke Lydia Lynn Madeline Madison Maggie Malcolm Marcus Margaret Maria
Marie Marilyn Mario Marion Marjorie Marlene Marsha Martha Martin Marvin Mary Mason Matt Matthew Maureen Maurice Megan Melanie
Melinda Melissa Melvin Meredith Mia Michael Michele Michelle Miguel Mike Mildred Mitchell Molly Monica Monique Morgan Nancy Naomi
Natalia Natalie Nathan Nathaniel Neil Nicholas Nicole Nigel Noah Nora Norma Norman Oliver Olivia Oscar Owen Pamela Patricia Patrick
Paul Paula Pauline Peggy Penelope Peter Philip Phillip Phyllis Rachel Ralph Randy Raymond Rebecca Renee Rhonda Ricardo Richard
Rick Ricky Rita Rob Robert Roberta Robin Rodney Roger Roland Ron Ronald Rosemary Ross Roy Russell Ruth Ryan Sally Sam Samantha Samuel
Sandra Sara Sarah Savannah Scott Sean Sebastian Seth Shane Shannon Sharon Shaun Shawn Sheila Shelby Shirley Sidney Simon Sophia
Sophie Spencer Stacey Stacy Stan Stanley Stella Stephanie Stephen Steve Steven Stewart Stuart Sue Susan Suzanne Sylvia Tamara Tammy
Tara Ted Teresa Terrence Terry Thelma Theodore Theresa Thomas Tiffany Tim Timothy Tina Toby Todd Tom Tommy Toni Tony Tracey Tracy
Travis Trevor Tyler Tyrone Valerie Vanessa Vera Vernon Veronica Vicki Victor Victoria Vincent Virginia Vivian Wallace Walter Wanda
Warren Wayne Wendy Wesley Wilfred William Willie Wilma Winifred Xavier Yolanda Yvonne Zachary Zoe
Achim Andreas Anja Anke Annette Annika Antje Armin Axel Bärbel Bernd Birgit Bruno Christoph Claus Detlef Dieter Dietrich Dirk Elke
Emil Ernst Franz Frieda Friedrich Fritz Gerda Gerhard Gertrud Gisela Gottfried Greta Gudrun Günter Günther Hans Heike Heiko Heinrich
Heinz Helga Helmut Hermann Horst Hubert Ingo Ingrid Irmgard Jens Joachim Jochen Johann Johanna Johannes Jonas Jörg Jürgen Jutta Karin
Karsten Katja Katrin Klaus Konrad Kristian Leonie Lieselotte Lothar Ludwig Lukas Manfred Markus Matthias Maximilian Michaela Monika
Moritz Niklas Norbert Olaf Otto Petra Rainer Ralf Reinhard Renate Rolf Rüdiger Sabine Sascha Sibylle Siegfried Sigrid Silke Stefan
Stefanie Susanne Sven Thorsten Tobias Torsten Udo Ulrich Ulrike Ursula Uta Ute Uwe Volker Walther Wilhelm Wolfgang
Adrien Aline Amélie Anaïs André Antoine Arnaud Aurélie Baptiste Benoît Bernadette Bertrand Camille Cécile Cédric Céline Chantal
Christelle Christophe Claude Clément Corinne Damien Delphine Didier Dominique Édouard Élise Élodie Émile Émilie Étienne Fabien
Fabrice Florent Franck François Françoise Frédéric Gaëlle Gérard Ghislaine Gilles Guillaume Guy Hélène Henri Hugo Isabelle Jacques
Jérôme Josette Julien Juliette Laurent Léa Lucie Ludovic Manon Marcel Margaux Marguerite Marianne Martine Mathieu Mathilde Maxime
Mélanie Michel Monique Muriel Nathalie Nicolas Noémie Odile Olivier Pascal Philippe Pierre Quentin Raphaël Rémi René Sandrine
Sébastien Ségolène Solange Stéphane Sylvain Sylvie Thérèse Thibault Thierry Valentin Véronique Xavier Yves
Adriana Agustín Alberto Alejandro Alfonso Alfredo Álvaro Andrés Ángel Ángela Araceli Arturo Beatriz Camila Catalina Claudio Consuelo
Cristina Cristóbal Daniela Diego Eduardo Elisa Emilio Enrique Esteban Esperanza Eugenia Federico Felipe Fernanda Fernando Francisca
Francisco Gabriela Gerardo Gonzalo Guadalupe Guillermo Gustavo Héctor Hernán Ignacio Inés Isidro Jaime Javier Jesús Joaquín José
Josefina Juana Julieta Julio Leticia Lorena Lorenzo Lucía Luisa Manuel Manuela Marcela Marcelo Margarita Mariana Mariano Marisol
Marta Martín Matías Mauricio Mercedes Mónica Nicolás Óscar Pablo Paloma Patricio Pedro Pilar Rafael Ramón Raquel Raúl Ricardo
Roberto Rocío Rodrigo Rogelio Rosa Rosario Salvador Santiago Sergio Sofía Susana Teodoro Valentina Verónica Vicente Ximena Yolanda
Afonso Aline Amanda Anabela Beatriz Bernardo Bruna Caio Catarina Cauã Diogo Duarte Fábio Flávia Gonçalo Guilherme Henrique Inês João
Joaquim Jorge Larissa Letícia Lourenço Luana Luiz Mafalda Márcia Marcos Mateus Miguel Murilo Nuno Otávio Paulo Renata Renato Rui
Tânia Teresa Thaís Thiago Tiago Tomás Vasco Vinícius Vitor Vitória
Alessandra Alessandro Alessia Angelo Antonella Barbara Benedetta Bianca Carlo Caterina Chiara Claudio Cristiano Cristina Daniele
Dario Davide Donatella Elisabetta Emanuele Enrico Enzo Ettore Fabio Fabrizio Federica Filippo Francesca Francesco Franco Gabriele
Gaia Giacomo Gianluca Gianni Giorgia Giorgio Giovanna Giovanni Giulia Giulio Giuseppe Giuseppina Guido Ilaria Isabella Leonardo
Lorenzo Luca Lucia Luciano Luigi Marcello Marco Massimo Matteo Mattia Maurizio Michela Mirko Nicola Ornella Paola Paolo Pasquale
Pietro Raffaele Riccardo Roberto Romano Rossella Salvatore Serena Silvia Simona Simone Stefania Stefano Tommaso Umberto Valeria
Vincenzo Vittoria Vittorio
Anneke Anouk Bart Bas Bram Cornelis Daan Dirk Elske Esmee Femke Floris Gerrit Hendrik Ineke Jaap Jasper Jeroen Joost Joris Jurgen
Karel Koen Lieke Maarten Machteld Marieke Marijke Marloes Mieke Niels Pieter Roel Ruud Saskia Sander Sanne Sjoerd Stijn Thijs Tjeerd
Wim Willem Wouter
Agneta Aino Anders Anja Arne Arvid Åke Åsa Astrid Birgitta Bjarne Björn Bjørn Bo Carina Christer Einar Elin Elsa Erkki Espen Eivind
Frida Fredrik Freja Gunnar Gunilla Gustav Håkan Hanne Haakon Harald Hedda Henrik Hilde Ingeborg Inger Jari Johan Jørgen Juha Jukka
Kaarina Kari Katarina Kirsten Kjell Kristoffer Lars Lasse Leena Leif Liisa Linnea Magnus Maja Malin Marit Marjatta Markku Mats Matti
Mette Mikael Mikko Minna Morten Nils Ole Olof Oskar Øystein Pär Pekka Pernilla Petter Pia Ragnar Rasmus Riitta Rune Saara Sakari
Sami Signe Sigrid Sigurd Siri Solveig Søren Stig Sven Tapio Terje Tiina Timo Tore Torbjörn Tove Trine Tuomas Ulf Ulla Vidar Viggo
Ville Yngve
Agata Agnieszka Aleksandra Andrzej Aneta Beata Bogdan Bogusław Bożena Czesław Damian Danuta Dariusz Dorota Elżbieta Ewa Grażyna
Grzegorz Halina Hanna Henryk Irena Iwona Jacek Jadwiga Janina Janusz Jarosław Jerzy Joanna Jolanta Józef Justyna Kamil Karol Karolina
Katarzyna Kazimierz Krystyna Krzysztof Leszek Łukasz Maciej Magdalena Małgorzata Marcin Marek Mariusz Marzena Mateusz Michał
Mirosław Paweł Piotr Radosław Renata Ryszard Sławomir Stanisław Stefan Sylwia Szymon Tadeusz Tomasz Urszula Waldemar Wanda Wiesław
Witold Wojciech Zbigniew Zdzisław Zofia Zuzanna
Alena Antonín Blanka Bohumil Božena Dagmar Dalibor Dana Drahomíra František Hana Ivana Jana Jaromír Jaroslav Jindřich Jiří Jitka
Kateřina Ladislav Lenka Libor Ludmila Marcela Markéta Martina Milan Miloš Miroslav Ondřej Pavel Petr Radek Radka Růžena Šárka
Stanislav Štěpán Tereza Tomáš Václav Věra Vladimír Vlasta Vojtěch Zdeněk Zdeňka Zuzana
Anikó Attila Balázs Béla Csaba Dániel Dóra Erzsébet Eszter Ferenc Gábor Gergely György Gyula Ildikó Imre István János Judit Kálmán
Katalin Kinga László Levente Márta Mátyás Miklós Réka Sándor Szilvia Tamás Tibor Zoltán Zsófia Zsolt Zsuzsanna
Aleksandar Ante Biljana Boris Bojan Boštjan Branko Dejan Dragan Dragana Goran Gordana Igor Ivana Ivica Jasna Jelena Jovana Jure Katja
Ljiljana Luka Marija Marko Matej Milena Miodrag Mirjana Mladen Nataša Nebojša Nenad Nevena Nikola Petar Sanja Slavica Slobodan Snežana
Srđan Stjepan Tanja Tatjana Tomislav Uroš Vesna Vladan Vuk Zoran Željko
Alina Ana-Maria Andreea Bogdan Camelia Constantin Corina Cosmin Cristian Dumitru Elena Florin Gheorghe Ileana Ioana Ion Ionuț Iulia
Liviu Loredana Mihaela Mihai Mircea Monica Oana Octavian Radu Raluca Răzvan Simona Ștefan Teodora Tudor Vasile Viorel
Alexei Aleksei Anastasia Anatoly Andrei Arkady Boris Darya Denis Dmitri Dmitry Ekaterina Evgeny Galina Gennady Grigory Igor Ilya Irina
Kirill Konstantin Ksenia Larisa Lev Lidia Lyudmila Maksim Marina Mikhail Nadezhda Natalya Nikita Nikolai Nina Oksana Oleg Olga Pavel
Polina Ruslan Sergei Sergey Stanislav Svetlana Tamara Tatiana Tatyana Timur Vadim Valentin Valentina Valery Vasily Viktor
Viktoria Vitaly Vladimir Vladislav Vyacheslav Yaroslav Yegor Yekaterina Yelena Yevgeny Yulia Yuri Zinaida Bohdan Halyna Mykola
Oleksandr Olena Taras Volodymyr
Ahmet Ali Arda Ayşe Aylin Barış Burak Cem Cemal Deniz Elif Emine Emre Erdem Erdoğan Esra Fatih Fatma Furkan Gökhan Hakan Halil
Hasan Hatice Hülya Hüseyin İbrahim İsmail Kemal Kerem Leyla Mehmet Melek Merve Mert Murat Mustafa Nuray Onur Orhan Osman Ömer Özlem
Ramazan Recep Selim Selin Serkan Sevgi Sibel Tuğba Tolga Turgut Umut Volkan Yasemin Yusuf Zehra Zeynep
Abdallah Abdul Abdullah Abu Adel Ahmad Ahmed Aisha Amal Amina Amir Anwar Ayman Aziz Bilal Dina Fadi Fahad Faisal Farah Farid Faris
Fatima Fouad Habib Hadi Hamid Hamza Hanan Hani Hassan Huda Hussein Ibrahim Imad Imran Iman Jamal Jamila Karim Khadija Khaled Khalid
Khalil Laila Layla Leila Mahmoud Malik Mariam Maryam Mohamed Mohammad Mohammed Mona Muhammad Mustafa Nabil Nadia Nasser Noor Nour Omar
Osama Rami Rania Rashid Reem Rima Saad Saif Salim Salma Samir Samira Sana Sara Tarek Tariq Walid Yasmin Yasmine Yasser Yousef
Youssef Yusuf Zahra Zainab Ziad Arash Arman Babak Behrouz Dariush Farhad Farzaneh Kaveh Mehdi Mina Nasrin Parisa Reza Shirin Soraya
Aarav Abhishek Aditi Aditya Ajay Akash Amit Amrita Anand Anil Anita Anjali Ankit Anushka Aparna Arjun Arun Asha Ashok Bhavna Chandra
Deepak Deepika Dev Divya Farhan Gaurav Geeta Gopal Harish Hari Indira Ishaan Jaya Jyoti Kavita Kiran Kishore Krishna Kunal Lakshmi
Lalita Madhuri Mahesh Manish Manoj Meena Meera Mohan Mukesh Nandini Naveen Neha Nikhil Nisha Nitin Padma Pankaj Pooja Prakash Pranav
Prashant Preeti Priya Priyanka Radha Rahul Raj Rajesh Rajiv Rakesh Ramesh Ravi Rekha Ritu Rohan Rohit Sachin Sandeep Sanjay Sanjeev
Santosh Sarita Seema Shanti Sharmila Shreya Shyam Siddharth Sita Smita Sneha Sonia Srinivas Subhash Sudha Sumit Sunil Sunita Suresh
Sushma Swati Uma Usha Vandana Varun Venkatesh Vijay Vikas Vikram Vinay Vinod Vishal Vivek
Aiko Akari Akihiro Akiko Akira Asuka Atsushi Ayaka Ayumi Chiyo Daichi Daisuke Emi Eiji Fumiko Haruka Haruki Haruto Hideki Hiroki
Hiroko Hiroshi Hiroyuki Hitomi Isamu Jiro Junko Kaori Kazuki Kazuko Kazuo Keiko Keisuke Kenichi Kenji Kenta Kiyoshi Koichi Kumiko
Maiko Makoto Mariko Masahiro Masako Masaru Mayumi Megumi Michiko Miho Minako Minoru Misaki Mitsuo Miyuki Nanako Naoki Naoko Naoto
Natsuki Noboru Noriko Ryo Ryota Sachiko Sakura Satoshi Shigeru Shinji Shizuka Shota Shun Sota Susumu Takahiro Takako Takashi Takeshi
Takumi Taro Tatsuya Tetsuya Tomoko Tomomi Toshiko Tsubasa Yasuko Yoko Yoshiko Yosuke Yui Yuichi Yuka Yuki Yukiko Yumi Yumiko Yusuke
Xiao Xiaoming Xiaoli Wei Weiwei Jing Jie Jun Lei Ling Mei Meiling Ming Ping Qiang Xin Yan Yang Ying Yong Yu Zhen Jian Jianhua Guo Hui
Hyun Jiho Jihoon Jimin Jisoo Minho Minjun Minji Seo-yeon Seojun Soo-jin Sungmin Yejin Young-ho Anh Duc Dung Hoa Huong Lan Linh Minh
Nam Ngoc Nguyen Phuong Quang Quan Thanh Thao Thi Thu Trang Tuan Vinh Agus Budi Dewi Indah Ketut Putri Rizky Siti Wayan Yanti
Abena Abiodun Achieng Adaeze Adebayo Adwoa Akosua Ama Amara Ayodele Babatunde Bongani Chidi Chika Chinedu Chioma Efua Emeka Esi Femi
Funmi Ifeoma Jabari Juma Kamau Kofi Kojo Kwabena Kwame Kwasi Lerato Lindiwe Makena Mandla Mwangi Naledi Ngozi Njeri Nkechi Nomsa Obi
Oluwaseun Olumide Sipho Tendai Thabo Themba Tunde Uche Wanjiku Yaw Zanele Zola
Aphrodite Athanasios Christos Despina Dimitra Dimitrios Dimitris Eleftheria Eleni Evangelos Georgia Georgios Giannis Ioannis Katerina
Konstantinos Kostas Kyriakos Michalis Nikos Panagiotis Sofia Spyros Stavros Theodoros Vasiliki Vasilis Yannis
Aviv Avi Avraham Chaim Chana Dov Eitan Eliezer Galit Gil Hadas Itzhak Menachem Moshe Nir Noa Ofer Orly Rivka Ronen Shai Shira Shlomo
Shmuel Tal Tamar Tzipora Yael Yehuda Yitzhak Yosef Yossi Zvi
"""
"""Without names that are as often another word: April, Grace, Mark, Will and the like are in AMBIGUOUS."""
AMBIGUOUS = """
Abu Amber Angel April August Bill Bo Brook Buddy Carter Chase Chelsea Chi Christian Cliff Clay Dale Dawn Dean Deniz Dev Dick Dolly Drew Earl
Eve Faith Florence Frank Gene Georgia Gil Ginger Glen Grace Grant Guo Guy Hari Hope Hui Hunter Iris Ivy Jack Jackson Jan Jasmine Jasper Jay
Jean Jesus Jesús Jing Jordan Joy June Juma Kim Kitty Lan Lance Lane Lee Lei Lev Lily Ling Logan Luna Malik Mark Marshall Mason Max May Mei
Melody Mercedes Miles Ming Mina Morgan Nam Nick Parker Pat Patience Penny Ping Porter Raj Ray Reed Rich Rob Robin Rose Rosa Rosario Ruby
Rusty Salvador Sam Sandy Santiago Savannah Scarlett Spencer Sterling Sue Sunny Tal Taylor Thanh Thu Thi Tiffany Ted Uma Usha Van Victoria
Victor Violet Virginia Wade Warren Wayne Wei Will Woody Xin Yan Yang Ying Yu Zoe
"""
"""Counted as names only beside a surname, a title or an introduction."""
NOT_NAMES = """
A About After Again All Alexa Also Am American An And Any Are As Ask At Australian Be Because Been Before Bot Brazilian British But By Canadian Chinese Christmas Could
Customer Did Do Does Dutch Earth Easter English European Every Everyone Excuse Federal For French Friend Friends From German Go God Good Google Got Great Greek Had Happy
Has Have He Hello Her Here Hers Hi His How However I If In Indian Internet Irish Is It Italian Its January February March July September October November December
Japanese Jewish Just Korean Let Look Madam Manager Many Maybe Me Mexican Monday More Most Much Muslim My National New Next No None Not Now Of Oh Ok Okay On Once One Only
Or Other Our Out Over Please Polish Portuguese Question Really Russian Saturday See She Should Sir Siri So Some Sorry Spanish State States Such Sunday Sure Swedish Swiss
Team Thank Thanks That The Their Them Then There These They This Those Thursday To Today Tomorrow Too Tuesday Turkish Two Under Union United University Us User Very Was
We Wednesday Well Welcome Were What When Where Which While Who Why With World Would Yes Yesterday You Your Yours Friday Mom Dad Mum Grandma Grandpa Aunt Uncle Street
Avenue Road Company Corporation Inc Ltd Group Bank Airlines Airport Hotel Park School College City County River Lake Mount Island Church Hospital Sir Santa Day Bay Beach
Producer Director Author Professor President Founder Singer Actor Actress Player Mayor Minister King Queen Prince Princess Saint
CEO Support Service Services Committee Court House Number Email Phone Address Name Date
"""
"""With a capital, and no name nor a part of one."""
THINGS = """
Street St Avenue Ave Road Rd Boulevard Lane Drive Court Square Terrace Place Way Circle Highway Crescent Close Grove Gardens Bypass Union Flat Hill Bridge Park Station
Capital Investments Partners Holdings Lines Systems Sons Brothers Bros Associates Foundation Institute Center Centre Inc Ltd LLC Corp Corporation Company Group Bank
University College School Hospital Hotel Airport Airlines Museum Prize Award River Lake Mount Mountains Island Islands Beach Bay County City Valley Church Cathedral
Apt Suite Unit Floor Stadium Theatre Theater Palace Castle Tower Hall House Library Province Empire Wars Scotia Ranch Trail District Kingdom Republic Ocean Sea Desert Forest Festival Cup League Act Law Theorem Effect Syndrome Disease Version Edition
"""
"""After a given name they make it a street, a company or a thing."""
