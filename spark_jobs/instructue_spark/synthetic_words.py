"""The words of the synthetic data set: what each source says about each latent interest, and about none."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """The vocabulary of one interest.

    Attributes:
        merchants: Merchant categories of `bill`, the common ones first, as everywhere below.
        services: Mini programs.
        pages: Pages of `spm` paths.
        apps: Apps.
        topics: What searches are about.
        spend: Typical amount of a bill.
    """

    merchants: tuple[str, ...]
    services: tuple[str, ...]
    pages: tuple[str, ...]
    apps: tuple[str, ...]
    topics: tuple[str, ...]
    spend: float


def vocabulary(interest: str, words: Words) -> tuple[str, ...]:
    """All words of an interest as they stand in event texts: a page follows its site in the path.

    >>> vocabulary("cars", Words(merchants=("car wash",), services=(), pages=("fines",), apps=(), topics=(), spend=9))
    ('car wash', 'cars.fines')
    """
    pages = tuple(f"{interest}.{page}" for page in words.pages)
    # A word may serve several sources.
    return tuple(dict.fromkeys((*words.merchants, *words.services, *pages, *words.apps, *words.topics)))


def _words(merchants: str, services: str, pages: str, apps: str, topics: str, spend: float) -> Words:
    lists = (tuple(text.split(", ")) for text in (merchants, services, pages, apps, topics))
    one, two, three, four, five = lists
    return Words(merchants=one, services=two, pages=three, apps=four, topics=five, spend=spend)


INTERESTS: dict[str, Words] = {
    "travel": _words(
        "hotel, airline, railway, travel agency, luggage store, tourist attraction",
        "flight booking, train tickets, hotel deals, visa help",
        "flights, hotels, itineraries, visa",
        "trip planner, flight tracker, hotel finder, offline maps",
        "cheap flights, beach hotel, train tickets, visa documents,"
        " travel insurance, city guide, airport transfer, cruise",
        600,
    ),
    "cooking": _words(
        "fresh market, butcher, bakery, kitchenware store, spice shop, seafood market",
        "grocery delivery, recipe box, farm produce, meal planner",
        "recipes, groceries, kitchen, tasting",
        "recipe book, grocery express, calorie cook, bread timer",
        "dumpling recipe, cast iron pan, fresh seafood, bread flour, rice cooker,"
        " hot pot, chef knife, organic vegetables",
        60,
    ),
    "fitness": _words(
        "gym, sports store, swimming pool, running shoes store, yoga studio, nutrition store",
        "gym booking, step challenge, court rental, marathon signup",
        "workouts, gyms, nutrition, races",
        "run tracker, yoga daily, muscle log, heart rate",
        "protein powder, running shoes, yoga mat, gym membership, marathon training,"
        " knee brace, swimming lessons, dumbbells",
        120,
    ),
    "finance": _words(
        "fund purchase, stock broker, insurance, gold shop, tax service, bank",
        "fund market, insurance centre, credit report, gold account",
        "funds, insurance, wealth, rates",
        "stock watch, fund guide, budget book, mobile bank",
        "index fund, mortgage rate, gold price, term insurance, credit score, dividend stocks, tax refund, bond yield",
        2000,
    ),
    "gaming": _words(
        "game store, game top-up, esports arena, computer store, console store, internet cafe",
        "game top-up, game gifts, esports tickets, gaming rental",
        "games, topup, esports, skins",
        "battle arena, card duel, game chat, stream live",
        "gaming mouse, game skins, graphics card, console bundle, esports final,"
        " level boost, gaming chair, puzzle game",
        90,
    ),
    "parenting": _words(
        "baby store, toy store, kindergarten, paediatric clinic, children clothing, playground",
        "vaccination booking, early learning, nanny service, toy rental",
        "babycare, toys, school, vaccines",
        "baby tracker, story time, growth chart, parent circle",
        "diapers, baby formula, stroller, picture books, kindergarten,"
        " toddler shoes, vaccination schedule, baby monitor",
        150,
    ),
    "cars": _words(
        "petrol station, car repair, car wash, parking garage, tyre store, car accessories",
        "petrol coupons, traffic fines, car wash booking, charging stations",
        "carcare, charging, fines, usedcars",
        "road navigator, charge point, car market, parking finder",
        "winter tyres, used cars, dash cam, car insurance, charging station, engine oil, car loan, driving licence",
        250,
    ),
    "fashion": _words(
        "clothing store, shoe store, cosmetics store, hair salon, jewellery store, nail studio",
        "style deals, beauty booking, luxury outlet, makeup trial",
        "dresses, shoes, beauty, brands",
        "style mirror, beauty box, outfit diary, shoe drop",
        "summer dress, lipstick, sneakers, hair dye, silk scarf, handbag, skin care, silver earrings",
        180,
    ),
    "home": _words(
        "furniture store, hardware store, home appliances, lighting store, cleaning service, garden centre",
        "home repair, cleaning booking, furniture deals, moving service",
        "furniture, appliances, repairs, decor",
        "room designer, smart home, repair guide, plant care",
        "sofa, air conditioner, wall paint, robot vacuum, mattress, curtains, plumber, desk lamp",
        400,
    ),
    "pets": _words(
        "pet store, veterinary clinic, pet grooming, pet hotel, aquarium store, pet food",
        "vet booking, pet adoption, grooming booking, pet insurance",
        "dogs, cats, vets, petfood",
        "pet diary, vet chat, dog walker, cat cam",
        "cat litter, dog food, puppy vaccine, fish tank, cat tree, dog leash, pet grooming, flea treatment",
        80,
    ),
    "music": _words(
        "concert tickets, instrument store, karaoke, record store, music school, theatre",
        "concert tickets, karaoke booking, music lessons, festival pass",
        "concerts, albums, karaoke, lessons",
        "song stream, guitar tuner, sing along, piano coach",
        "concert tickets, guitar strings, vinyl records, piano lessons, headphones,"
        " karaoke room, song lyrics, music festival",
        130,
    ),
    "study": _words(
        "bookstore, training centre, stationery store, language school, exam fee, library",
        "library card, exam signup, language course, study rooms",
        "courses, exams, books, languages",
        "word cards, exam prep, course hub, note book",
        "english course, exam dates, notebook, study room, scholarship,"
        " programming course, dictionary, graduate school",
        110,
    ),
}
"""The twelve latent interests; their order is the order of a user's `strengths`."""

NOISE = _words(
    "convenience store, supermarket, electricity bill, phone top-up, bus fare, pharmacy, vending machine, water bill,"
    " fast food, parcel service, coffee shop, parking meter",
    "transfer, utility payments, city services, bike share, parcel tracking, health code, bus card, weather",
    "home, messages, scan, profile",
    "messenger, browser, calculator, cloud photos, keyboard, news feed, wifi master, alarm clock",
    "weather tomorrow, bus route, phone bill, parcel tracking, lucky number,"
    " holiday calendar, red packet, nearby toilet,"
    " exchange photo, screen repair, customer service, lottery result",
    40,
)
"""What everybody does, whatever they like."""

ACTIONS = ("open", "order", "pay")
BLOCKS = ("feed", "banner", "search", "list")
APP_ACTIONS = ("open", "install", "uninstall")
MODIFIERS = ("", " near me", " discount", " price", " reviews", " today", " best", " how to")
