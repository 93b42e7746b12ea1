"""Which tasks are played, and how: the flags that training, fine-tuning and evaluation share."""
from dataclasses import dataclass

from plumbing.flags import flag, require
from robots.suite import SuiteOptions


@dataclass
class SuiteSettings:
    suite: str = flag("tabletop", "tabletop, tabletop_long, libero_spatial, libero_object, "
                                  "libero_goal, libero_10 or libero_90")
    tasks: list[int] = flag([], "task numbers (all if none is given)")
    protocol: str = flag("openvla-oft", "LIBERO: whose horizons",
                         choices=["openvla-oft", "simplevla"])
    horizon: int = flag(0, "LIBERO: env steps of an episode at most; 0: the protocol's")
    hard: bool = flag(False, "LIBERO: build the simulator anew at every reset, as the stock "
                             "environment does; seconds each")
    fast_sim: bool = flag(False, "LIBERO: other pixels, same physics, faster; for policies "
                                 "trained so")
    assets: str = flag("", "LIBERO: folder of its assets (LIBERO_ASSETS, else the package's, "
                           "else from the hub)")
    workers: int = flag(2, "simulator processes")
    tables: int = flag(0, "parallel environments over all workers; 0: 128, or with LIBERO one "
                          "per worker")

    def options(self) -> SuiteOptions:
        return SuiteOptions(self.protocol, self.horizon, self.hard, self.fast_sim, self.assets,
                            getattr(self, "plus", ""))


def check_suite(s: SuiteSettings) -> None:
    """ValueError, one line, for a setting out of range."""
    require(s, dict(horizon=0, workers=1, tables=0))
    if 0 < s.tables < s.workers:
        raise ValueError(f"--tables {s.tables} is less than --workers {s.workers}: "
                         "each worker needs one")
