"""The words orders are made of: names, goods, and the phrases of the sentences. Data only.

Every list is split by seed into a training and a test part, so each must be long enough for both.
"""


def _words(text: str) -> list[str]:
    """Word lists stand as text: one word a line would be 500 lines."""
    return text.split()


FIRST_NAMES = _words("""
Ada Agnes Albert Alice Amir Andre Anita Anna Anton Arthur Astrid Barbara Beatrice Ben Bruno Carla Carlos
Carmen Cecilia Chloe Clara Claude Daniel Daphne David Diana Diego Dora Edgar Edith Elena Eliot Elsa Emil
Emma Erik Esther Eva Fatima Felix Fiona Flora Frank Frida George Grace Greta Gustav Hannah Harold Hassan
Hector Helen Henry Hugo Ida Igor Ines Ingrid Irene Isaac Ivan Jacob James Jasmine Joan Jonas Julia Karen
Karl Kate Kenji Laura Lena Leo Lila Linda Louis Lucas Lucy Magnus Marco Maria Marie Martin Maya Mila Mina
Miriam Mona Nadia Naomi Nina Nora Olga Oliver Omar Oscar Otto Paul Pedro Peter Petra Philip Priya Quentin
Rachel Ralph Rita Robert Rosa Ruth Samir Sara Sofia Stella Sven Tara Theo Thomas Tina Uma Ursula Vera Victor
Viola Walter Wanda Yara Yusuf Zoe
""")

LAST_NAMES = _words("""
Abbott Adler Almeida Archer Baker Barnes Becker Bell Berg Bishop Blake Bauer Brandt Brennan Brooks Burke
Campos Carter Chan Clarke Cohen Cole Conrad Costa Cruz Dalton Davies Dietrich Doyle Duarte Dunn Ellis Evans
Falk Farrell Ferrari Fischer Fleming Fletcher Flores Foster Fox Garcia Gibson Goldman Grant Greene Haas Hale
Hansen Harper Hayes Hoffman Holmes Horvath Hughes Ibrahim Ivanov Jansen Jensen Jordan Kaplan Keller Kelly
Khan Kim Klein Kovacs Kumar Lambert Lang Larsen Lee Lewis Lindgren Lopez Lund Marino Mendes Meyer Miller
Monroe Moreau Morgan Murphy Nelson Nguyen Nolan Novak Olsen Ortega Osborne Owens Park Parker Patel Perez
Petrov Porter Quinn Ramos Reed Reyes Ricci Rivera Romero Rossi Russo Sanders Santos Sato Schmidt Shah Silva
Singh Sokolov Stein Stone Suzuki Tanaka Taylor Torres Turner Vargas Vega Vogel Wagner Walsh Weber Webster
Weiss Wilson Wolf Wong Yamada York Young Zimmer
""")

# The first word of a good: neither another good's noun nor a word that says how many.
MODIFIERS = _words("""
amber black blue brown cheap classic copper cotton cream dark electric folding glass golden green grey
handmade heavy large leather light long metal modern narrow navy nylon oak orange padded paper pine pink
plain plastic portable purple recycled red round rubber rustic short silver simple slim small soft square
steel striped tall thick thin violet vintage waterproof white wide wooden yellow
""")

NOUNS = _words("""
apron armchair backpack badge banner basin basket bell belt bench blanket blind board bolt book bottle bowl
box bracket brick broom brush bucket bulb cabinet cable candle canvas cap carpet case chair chest chisel
clamp clock coat cooler cork crate cup curtain cushion desk diary dish door drawer drill duvet easel
envelope fan faucet fence file filter flag flask folder fork frame funnel gate glove grill hammer handle
hanger hat heater helmet hinge hook hose jacket jar jug kettle keyboard knife label lamp lantern lid locker
magnet marker mask mattress mirror mixer monitor mop mug nail napkin needle notebook oven pan pen pencil
pillow pipe pitcher planter plate plug poster pot printer pump rack rake ribbon roller rope rug ruler sack
saucer saw scarf screen shelf shovel sieve sign sink sofa speaker spoon stapler stool stove strap table tent
tile timer toolbox torch towel tray trolley tube umbrella vase vest wardrobe wheel whisk wrench
""")

# Nouns whose plural no rule in orders.py gives.
IRREGULAR_PLURALS = {"knife": "knives", "shelf": "shelves", "scarf": "scarves", "canvas": "canvases"}

# How an order writes a quantity, and the integer of the answer. Training and test share these: they are the
# rule to be learned, not words to be copied.
QUANTITIES = {
    "a": 1,
    "one": 1,
    "a single": 1,
    "two": 2,
    "a pair of": 2,
    "a couple of": 2,
    "three": 3,
    "four": 4,
    "five": 5,
    "six": 6,
    "half a dozen": 6,
    "seven": 7,
    "eight": 8,
    "nine": 9,
    "ten": 10,
    "eleven": 11,
    "twelve": 12,
    "a dozen": 12,
    "fifteen": 15,
    "twenty": 20,
    "two dozen": 24,
    "thirty": 30,
}

# Sentences that only say who writes.
GREETINGS = [
    "{customer} here.",
    "Hello, {customer} speaking.",
    "This is {customer}.",
    "My name is {customer}.",
    "Hi, it's {customer}.",
    "Good morning, {customer} writing.",
    "I'm {customer}.",
    "Hi there, I am {customer}.",
    "Good day, my name's {customer}.",
    "{customer} writing to you.",
    "Customer: {customer}.",
    "From {customer}:",
    "Order from {customer}.",
    "Hey, this is {customer} again.",
    "Dear team, {customer} here.",
    "On behalf of {customer}.",
]

# Sentences that only say what is wanted.
REQUESTS = [
    "I'd like {items}.",
    "Please put me down for {items}.",
    "We need {items}.",
    "I want to order {items}.",
    "Could I get {items}?",
    "Can you set aside {items}?",
    "I'll take {items}.",
    "We are looking for {items}.",
    "Please reserve {items}.",
    "My order is {items}.",
    "Order: {items}.",
    "What I need is {items}.",
    "We would like to buy {items}.",
    "Let me have {items}.",
    "I am ordering {items}.",
    "Please prepare {items}.",
    "May I have {items}?",
    "Wanted: {items}.",
    "Our list: {items}.",
    "Add {items} to my order.",
]

# Sentences that say both.
REQUESTS_WITH_CUSTOMER = [
    "{items} for {customer}, please.",
    "{customer} needs {items}.",
    "{customer} would like {items}.",
    "Please note an order for {customer}: {items}.",
    "{customer} wants to order {items}.",
    "New order for {customer}: {items}.",
    "Book {items} under the name {customer}.",
    "{customer} is asking for {items}.",
    "Our customer {customer} ordered {items}.",
    "I have {customer} on the phone, who wants {items}.",
    "Could {customer} get {items}?",
    "{items}, to be billed to {customer}.",
    "Set aside {items} for {customer}.",
    "{customer} called and asked for {items}.",
    "In the name of {customer}: {items}.",
    "{customer} will take {items}.",
]

SIGN_OFFS = [
    "Thanks, {customer}",
    "Regards, {customer}",
    "Best, {customer}",
    "- {customer}",
    "Yours, {customer}",
    "Kind regards, {customer}",
    "Thank you! {customer}",
    "Cheers, {customer}",
    "Sincerely, {customer}",
    "The name is {customer}.",
    "Many thanks from {customer}.",
    "Signed, {customer}",
    "Greetings, {customer}",
    "Put it under {customer}.",
]

DELIVERIES = {
    "pickup": [
        "I'll pick it up myself.",
        "We will collect it at the counter.",
        "Pickup, please.",
        "I will come by and collect everything.",
        "Someone from our side will pick it up.",
        "Keep it at the shop, I'll fetch it.",
        "No shipping, we collect.",
        "Customer pickup.",
        "I'd rather pick it up in person.",
        "Store pickup is fine.",
        "My brother will collect it.",
        "I'm going to fetch it at your store.",
        "Leave it at the desk for collection.",
        "We'll stop by to pick it up.",
        "I can collect it from you.",
        "We want to pick this up ourselves.",
    ],
    "courier": [
        "Send it by courier.",
        "Courier delivery, please.",
        "Please have a courier bring it.",
        "Use a courier.",
        "It should go out with the courier.",
        "A courier should bring it to our door.",
        "Hand it to a courier.",
        "Dispatch by courier.",
        "Delivery: courier.",
        "We'd like a courier to deliver it.",
        "Let your courier drop it off.",
        "Get a courier to bring it over.",
        "Give it to the courier.",
        "The courier can leave it at reception.",
        "I prefer delivery with a courier.",
        "Ship it with your courier.",
    ],
    "post": [
        "Send it by post.",
        "Post it to us.",
        "By mail, please.",
        "Mail it to our address.",
        "Put it in the post.",
        "Regular mail is fine.",
        "Ship it through the postal service.",
        "Parcel post works for me.",
        "Drop it in the mail.",
        "You can post it.",
        "Delivery by post.",
        "Please use the postal service.",
        "Just mail everything to me.",
        "It can come with the post.",
        "Ship by mail.",
        "I'd like it in the mail.",
    ],
}

URGENT = [
    "It's urgent.",
    "We need it today.",
    "As soon as possible, please.",
    "ASAP!",
    "This is a rush order.",
    "Please hurry.",
    "It cannot wait.",
    "Top priority.",
    "Right away, please.",
    "Needed immediately.",
    "We're in a hurry.",
    "I need it at once.",
    "Urgent!",
    "Every hour counts.",
    "This has to be quick.",
    "The matter is pressing.",
]

NOT_URGENT = [
    "No rush.",
    "There is no hurry.",
    "Take your time.",
    "Not urgent.",
    "Whenever it suits you.",
    "Any time this month is fine.",
    "It can wait.",
    "No need to hurry.",
    "Next month is early enough.",
    "We are not in a hurry.",
    "It isn't pressing.",
    "We have plenty of time.",
]

# How the goods are strung together: between two of them, and before the last of three.
LISTS = [
    (", ", " and "),
    (", ", " plus "),
    (", ", ", and "),
    ("; ", "; "),
    (", ", " as well as "),
    (" and ", " and also "),
    (", ", ", "),
    (" + ", " + "),
    (", ", " together with "),
    (", then ", " and then "),
]

# The order of the sentences.
# G: greeting, R: request, B: request with customer, D: delivery, U: urgency, S: sign-off.
# With and without U stand apart, so that leaving it out of a training layout never gives a test layout.
LAYOUTS = _words("""
GRDU GURD GRUD GDRU GUDR GDUR RGDU RGUD UGRD DGRU DGUR BDU BUD UBD DBU RDUS RUDS URDS DRUS UDRS DURS
""")
LAYOUTS_WITHOUT_URGENCY = _words("""
GRD GDR DGR RGD BD DB RDS DRS
""")
