"""How much memory an app may use on each iPhone, with the source of every figure.

Apple publishes neither RAM nor limit. RAM is known from Xcode's device files and the press. The limit is what an app
with the increased-memory-limit entitlement was measured to get on a phone with that much RAM, mostly with
`os_proc_available_memory` at launch. The app asks the phone before it loads anything, so a figure that is too high
costs a notice, not a crash.
"""

from __future__ import annotations

from dataclasses import dataclass

GB = 1_000_000_000  # sources do not say GB or GiB; this is the smaller one


@dataclass(frozen=True)
class Limit:
    """Bytes that an app may use. source: where that was measured."""

    n_bytes: int
    source: str


@dataclass(frozen=True)
class Phone:
    """A model of iPhone. ram: GB, as its source gives it."""

    name: str
    title: str
    ram: int
    source: str

    @property
    def limit(self) -> Limit:
        """What an app may use."""
        return LIMITS[self.ram]


LIMITS = {
    4: Limit(2_400_000_000, "iPhone 12 mini, allenai/OLMoE.swift pull request 38 (2.1 GB without the entitlement)"),
    6: Limit(
        4_200_000_000, "iPhone 13 Pro, a-ghorbani/pocketpal-ai pull request 651 (3.12 GB without the entitlement)"
    ),
    8: Limit(6_000_000_000, "iPhone 15 Pro, introlab/rtabmap pull request 1446 (3 GB without the entitlement)"),
    12: Limit(6_000_000_000, "no measurement found: the figure of 8 GB phones"),
}

_XCODE_13 = "Xcode 13, macrumors.com/2021/09/15/how-much-ram-in-iphone-13 (iPhone 12: the same amounts)"
_XCODE_14 = "Xcode 14, mactrast.com/2022/09/iphone-14-and-iphone-14-pro-models-boast-6gb-of-ram"
_XCODE_15 = "Xcode 15, appleosophy.com/2023/09/13/iphone-15-pro-now-officially-features-8-gb-ram"
_SROUJI = "Apple's J. Srouji, aphnetworks.com/news/29221-apple-exec-confirms-all-iphone-16-models-will-have-8gb-ram"
_TRENDFORCE = "TrendForce before the launch, macrumors.com/2025/09/04/iphone-17-ram-amounts-trendforce"

PHONES = {
    phone.name: phone
    for phone in (
        Phone("iphone-12", "iPhone 12, 12 mini", 4, _XCODE_13),
        Phone("iphone-12-pro", "iPhone 12 Pro, Pro Max", 6, _XCODE_13),
        Phone("iphone-13", "iPhone 13, 13 mini", 4, _XCODE_13),
        Phone("iphone-13-pro", "iPhone 13 Pro, Pro Max", 6, _XCODE_13),
        Phone("iphone-14", "iPhone 14, Plus, Pro, Pro Max", 6, _XCODE_14),
        Phone("iphone-15", "iPhone 15, Plus", 6, _XCODE_15),
        Phone("iphone-15-pro", "iPhone 15 Pro, Pro Max", 8, _XCODE_15),
        Phone("iphone-16", "iPhone 16, Plus, Pro, Pro Max", 8, _SROUJI),
        Phone("iphone-17", "iPhone 17", 8, _TRENDFORCE),
        Phone("iphone-17-pro", "iPhone 17 Pro, Pro Max, Air", 12, _TRENDFORCE),
    )
}
