"""The words that orders are made of: names, goods and phrases. Data only.

Every list is split by seed into a training and a test part, so each must be long enough for both.

Names and goods were chosen to be one token of SmolLM2 each, first names and modifiers also right after a
quote: `cheap stool`, which JSON breaks into other pieces than the order does, was copied as `chef`.
"""


def _words(text: str) -> list[str]:
    """Word lists are written as text: one word per line would take 500 lines."""
    return text.split()


FIRST_NAMES = _words("""
Adam Alex Alexander Alice Andrew Ann Anna Anne Arthur Ben Bill Bob Charles Chris Christian Dan Daniel David
Donald Ed Edward Elizabeth Emily Frank Fred George Greg Henry Jack Jacob James Jane Jean Jeff Jim John Jon
Joseph Josh Ken Kim Leon Lewis Lily Louis Luke Maria Marie Martin Matt Matthew Max Maya Michael Neil Paul
Peter Ray Richard Robert Rose Sam Samuel Sarah Scott Simon Stephen Thomas Tim Tom Victor Virginia William
""")

LAST_NAMES = _words("""
Abbott Adams Adler Allen Anderson Bailey Baker Barnes Becker Bennett Berg Bishop Blake Boyd Bradley Brooks
Bryant Burke Butler Campbell Carr Carroll Carter Chan Chapman Chen Clark Clarke Cohen Cole Coleman Collins
Conrad Cooper Costa Craig Crawford Cruz Cunningham Dalton Davidson Davies Davis Dean Dixon Doyle Duncan Dunn
Edwards Ellis Evans Falk Ferguson Fischer Fisher Fleming Fletcher Foster Freeman Fuller Garcia Gardner
Gibson Gilbert Goldman Graham Griffin Hall Hamilton Hansen Harper Harris Harrison Hart Harvey Hawkins Hayes
Henderson Hoffman Holland Holmes Howard Hudson Hughes Hunter Ibrahim Jacobs Jenkins Jensen Johnson Johnston
Jones Jordan Kaplan Keller Kelly Kennedy Khan Klein Kumar Lambert Lang Lawrence Lee Li Lin Liu Lopez Lund
Marshall Martinez Mason McDonald Meyer Miller Mills Mitchell Monroe Moore Morgan Morris Morrison Murphy
Murray Myers Nelson Newman Newton Owens Palmer Parker Patel Perry Peterson Phillips Pierce Porter Powell
Quinn Reed Reid Reynolds Richards Richardson Rivera Roberts Robertson Robinson Rodriguez Rogers Ross Russell
Ryan Sanders Santos Schmidt Shah Shaw Silva Simpson Singh Smith Spencer Stanley Stein Stevens Stewart
Sullivan Thompson Thomson Torres Tucker Turner Wagner Walker Wallace Walsh Wang Ward Warren Washington
Watson Weaver Webb Weber Webster Weiss Wells Wheeler Williams Williamson Wilson Wolf Wong Wright Yang Young
Zhang Zimmer
""")

# The first word of an item's name: never a noun from NOUNS nor a word for a quantity.
MODIFIERS = _words("""
amber basic big black blue bright brown classic clear custom dark deep digital double electric fine flat
fresh glass gold green grey heavy iron large light local long magnetic manual metal mini mobile modern
natural neutral old orange organic oval paper plain plastic purple quiet red regular rough round sharp short
simple slow small smooth soft solar solid special square standard strong tall thick thin tiny used vertical
warm white wide yellow
""")

NOUNS = _words("""
badge bag ball banner bar basin basket bed bell belt bench bike blade blanket board boat bolt book boot
bottle bowl box bracket brick brush bucket bulb button cabinet cable camera candle cap card carpet cart case
chain chair clock coat coin column container counter cover cube cup curtain cylinder desk diary dish disk
doll door dress drill engine envelope fan feeder fence file filter fixture flag folder fork frame game gate
gift globe glove guitar handle hat heater helmet hinge hook hose instrument jacket jar key keyboard kit
knife label lamp lantern lens lid lock log machine magnet map marker mask mat mattress medal mirror model
monitor motor nail needle net notebook ornament oven pad panel pen pencil phone picture pillow pin pipe
plank plant planter plate platform plug pole pot printer pump puzzle rack radio rail ramp ribbon ring robot
rod roller rope rug ruler scale screen sensor sheet shelf shirt shoe sign sink skirt sock speaker spoon
spring stand statue stick sticker stool stove strap string suit switch table tablet tank tape telescope tent
ticket tie tile tire tool towel toy tractor train trap tray tube valve vessel wagon wallet wheel window wire
""")

# Nouns whose plural no rule in orders.py gives.
IRREGULAR_PLURALS = {"knife": "knives", "shelf": "shelves"}

# How an order writes a quantity, and the integer of the answer. Training and test share these: they are the
# rule to be learned, not words to be copied.
QUANTITIES = {
    "one": 1,
    "two": 2,
    "three": 3,
    "four": 4,
    "five": 5,
    "six": 6,
    "seven": 7,
    "eight": 8,
    "nine": 9,
    "ten": 10,
    "twelve": 12,
    "a dozen": 12,
    "twenty": 20,
}

# How an order names a day, and how the answer does. Shared like the quantities.
DAYS = {
    "Monday": "mon",
    "Tuesday": "tue",
    "Wednesday": "wed",
    "Thursday": "thu",
    "Friday": "fri",
    "Saturday": "sat",
    "Sunday": "sun",
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
        "We will pick it up at the counter.",
        "Pickup, please.",
        "I will come by and pick everything up.",
        "Someone from our side will pick it up.",
        "Keep it at the shop, I'll pick it up.",
        "No shipping, we pick it up.",
        "Customer pickup.",
        "I'd rather pick it up in person.",
        "Store pickup is fine.",
        "My brother will pick it up.",
        "I'm going to pick it up at your store.",
        "Leave it at the desk for pickup.",
        "We'll stop by to pick it up.",
        "I can pick it up from you.",
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
        "By post, please.",
        "Please post it to our address.",
        "Put it in the post.",
        "Regular post is fine.",
        "Ship it by post.",
        "Parcel post works for me.",
        "Drop it in the post.",
        "You can post it.",
        "Delivery by post.",
        "Please use the post.",
        "Just post everything to me.",
        "It can come with the post.",
        "I prefer the post.",
        "I'd like it in the post.",
    ],
}

DAYS_WANTED = [
    "I need it by {day}.",
    "We need everything on {day}.",
    "Please have it ready by {day}.",
    "It should be ready on {day}.",
    "{day} would be best.",
    "By {day}, please.",
    "On {day}, please.",
    "We want it this {day}.",
    "Day: {day}.",
    "It is for {day}.",
    "{day} suits us.",
    "Next {day} is fine.",
    "I would like it on {day}.",
    "Not later than {day}.",
    "{day} at the latest.",
    "Could it be {day}?",
    "We expect it on {day}.",
    "I count on {day}.",
    "Let's say {day}.",
    "The day is {day}.",
    "Make it {day}.",
    "{day} works for us.",
    "Can we have it by {day}?",
    "I'm hoping for {day}.",
]

# How the goods are strung together: between two of them, and before the last of three.
LISTS = [
    (", ", " and "),
    (", ", " plus "),
    (", ", ", and "),
    (", ", " & "),
    (", ", " as well as "),
    (" and ", " and also "),
    (", ", ", "),
    (", ", " along with "),
    (", ", " together with "),
    (", then ", " and then "),
]

# The order of the sentences.
# G: greeting, R: request, B: request with customer, D: delivery, W: day wanted, S: sign-off.
LAYOUTS = _words("""
GRDW GWRD GRWD GDRW GWDR GDWR RGDW RGWD WGRD DGRW DGWR WRGD BDW BWD WBD DBW DWB WDB RDWS RWDS WRDS DRWS
WDRS DWRS
""")
