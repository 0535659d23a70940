"""Short questions of common knowledge, with every spelling of an answer that counts as right.

Written for this project. An answer is right when it has one of the spellings as whole words.
"""

from __future__ import annotations

_TABLE = """
What is the capital of France?|Paris
What is the capital of Japan?|Tokyo
What is the capital of Italy?|Rome
What is the capital of Spain?|Madrid
What is the capital of Germany?|Berlin
What is the capital of Egypt?|Cairo
What is the capital of Russia?|Moscow
What is the capital of China?|Beijing
What is the capital of Greece?|Athens
What is the capital of England?|London
What is the capital city of Canada?|Ottawa
What is the capital city of Australia?|Canberra
Name the capital of Portugal.|Lisbon
Name the capital of Austria.|Vienna
Name the capital of Norway.|Oslo
Name the capital of Ireland.|Dublin
Name the capital of Poland.|Warsaw
Name the capital of Argentina.|Buenos Aires
Name the capital of India.|New Delhi|Delhi
Name the capital of Cuba.|Havana
Who wrote Romeo and Juliet?|Shakespeare
Who wrote Hamlet?|Shakespeare
Who wrote Pride and Prejudice?|Austen
Who wrote the novel 1984?|Orwell
Who wrote Oliver Twist?|Dickens
Who wrote War and Peace?|Tolstoy
Who wrote Don Quixote?|Cervantes
Who wrote The Origin of Species?|Darwin
Who painted the Mona Lisa?|Leonardo|da Vinci
Who painted The Starry Night?|Van Gogh|Gogh
Who painted the ceiling of the Sistine Chapel?|Michelangelo
Who composed the Ninth Symphony with the Ode to Joy?|Beethoven
Who composed The Magic Flute?|Mozart
Who discovered penicillin?|Fleming
Who discovered gravity when an apple fell, as the story goes?|Newton
Who developed the theory of relativity?|Einstein
Who is said to have invented the telephone?|Bell
Who invented the light bulb, according to most school books?|Edison
Who was the first president of the United States?|Washington
Who was the first person to walk on the Moon?|Armstrong
Who was the first human in space?|Gagarin
Which explorer reached the Americas in 1492?|Columbus
Which queen of Egypt is famous for Caesar and Antony?|Cleopatra
Which general crossed the Alps with elephants?|Hannibal
In which country are the pyramids of Giza?|Egypt
In which country is the Eiffel Tower?|France
In which country is the Taj Mahal?|India
In which country is the Great Wall?|China
In which country is Machu Picchu?|Peru
In which city is the Colosseum?|Rome
In which city is the Statue of Liberty?|New York
In which city is the Kremlin?|Moscow
On which continent is Kenya?|Africa
On which continent is Brazil?|South America|America
On which continent is Vietnam?|Asia
Which ocean lies between Europe and North America?|Atlantic
Which ocean is the largest?|Pacific
Which planet is known as the Red Planet?|Mars
Which planet is the largest in the solar system?|Jupiter
Which planet is closest to the Sun?|Mercury
Which planet is famous for its rings?|Saturn
What star is at the center of our solar system?|Sun
What natural satellite orbits the Earth?|Moon
What is the longest river in Africa?|Nile
What is the highest mountain in the world?|Everest
What is the largest animal on Earth?|blue whale|whale
What is the tallest animal?|giraffe
What is the fastest land animal?|cheetah
What is a baby cat called?|kitten
What is a baby dog called?|puppy
What is a young cow called?|calf
What do bees make?|honey
What do cows drink?|water
What do caterpillars turn into?|butterfly|butterflies|moth|moths
What do we call frozen water?|ice
What gas do plants absorb from the air?|carbon dioxide|CO2
What gas do humans need to breathe?|oxygen
What is the chemical symbol for gold?|Au
What is the chemical symbol for water?|H2O
What is the chemical symbol for oxygen?|O
What is the chemical symbol for iron?|Fe
What is the most abundant gas in the atmosphere of the Earth?|nitrogen
What is the hardest natural substance?|diamond
What metal is liquid at room temperature?|mercury
At what temperature in degrees Celsius does water boil at sea level?|100
At what temperature in degrees Celsius does water freeze?|0|zero
How many days are in a week?|7|seven
How many months are in a year?|12|twelve
How many hours are in a day?|24|twenty-four
How many minutes are in an hour?|60|sixty
How many days are in a leap year?|366
How many legs does a spider have?|8|eight
How many legs does an insect have?|6|six
How many sides does a triangle have?|3|three
How many sides does a hexagon have?|6|six
How many continents are there?|7|seven
How many planets are in the solar system?|8|eight
How many letters are in the English alphabet?|26|twenty-six
How many colors are in a rainbow?|7|seven
How many strings does a standard guitar have?|6|six
How many players of one football team are on the field?|11|eleven
What color do you get when you mix blue and yellow?|green
What color do you get when you mix red and white?|pink
What color is a ripe banana?|yellow
What color is the sky on a clear day?|blue
What color is grass?|green
What color is snow?|white
What language is spoken in Brazil?|Portuguese
What language is spoken in Mexico?|Spanish
What language is spoken in Austria?|German
What is the currency of Japan?|yen
What is the currency of the United Kingdom?|pound|pounds|sterling
What is the currency of the United States?|dollar|dollars
What is the currency used in Germany?|euro|euros
What organ pumps blood through the body?|heart
What organ do we use to think?|brain
What organs do we use to breathe?|lungs
What is the largest organ of the human body?|skin
What part of the plant grows under the ground?|root|roots
What instrument has black and white keys?|piano
What instrument is used to look at the stars?|telescope
What instrument measures temperature?|thermometer
What tool do you use to drive a nail into wood?|hammer
What is the opposite of north?|south
What is the opposite of hot?|cold
What is the opposite of day?|night
What is the opposite of buy?|sell
What is the plural of mouse, the animal?|mice
What is the plural of child?|children
What is the past tense of go?|went
What is the past tense of eat?|ate
What season comes after winter?|spring
What season comes before winter?|autumn|fall
What day comes after Monday?|Tuesday
What day comes before Sunday?|Saturday
What month comes after June?|July
What is the first month of the year?|January
What is the last month of the year?|December
What holiday is on December 25?|Christmas
In which year did the Second World War end?|1945
In which year did the First World War begin?|1914
In which year did people first land on the Moon?|1969
What wall fell in 1989?|Berlin
What ship sank on its first voyage in 1912?|Titanic
What sport is played at Wimbledon?|tennis
What game has a king, a queen and pawns?|chess
What drink is made from grapes and aged in barrels?|wine
What is bread made of?|flour|wheat
What fruit is used to make cider?|apple|apples
What vegetable makes people cry when they cut it?|onion|onions
What animal says meow?|cat|cats
What animal is called the king of the jungle?|lion
What bird is a symbol of peace?|dove
What bird cannot fly and lives in Antarctica?|penguin|penguins
"""


def questions() -> list[tuple[str, tuple[str, ...]]]:
    """Questions, each with all spellings that count as right."""
    rows = [line.split("|") for line in _TABLE.strip().splitlines()]
    return [(question, tuple(answers)) for question, *answers in rows]
