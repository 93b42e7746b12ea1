"""Which tasks are played, and how: flags of training, fine-tuning, evaluation; learning offline."""
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


@dataclass
class OfflineSettings:
    """What `vla_srpo.py offline` can be told besides; robots/offline.py."""
    stage: str = flag("", "what the command's first word says", choices=["", "offline"])
    data: str = flag("", "logged trajectories: folder of .npz, or LeRobot's, folder or hub id; "
                   "with --references, not offline: their successes are the first of them")
    camera: str = flag("", "LeRobot: feature of the images (its first)")
    weights: str = flag("progress", "progress: exp(A / temperature), A from increments of "
                        "progress; outcome: A from success alone; all: behaviour cloning; "
                        "successes: of those alone; rabc: LeRobot's RA-BC weights",
                        choices=["progress", "outcome", "all", "successes", "rabc"])
    curves: str = flag("ours", "progress; ours: against the task's other successes; paper: as its "
                       "Appendix B has it, a success against itself", choices=["ours", "paper"])
    awr_temperature: float = flag(1.0, "of weights; the paper has none, nor a bound")
    max_weight: float = flag(20.0, "no weight exceeds this")


def check_offline(s) -> None:
    """ValueError, one line; without progress there is no need of a world model."""
    if not s.stage:
        if s.data and (not s.references or s.world_model == "oracle"):
            raise ValueError("--data is for: python vla_srpo.py offline --data ..., or with "
                             "--references")
        return
    require(s, {}, ("awr_temperature", "max_weight"))
    if not s.data:
        raise ValueError("offline needs --data: a folder of logged trajectories, or a hub id")
    if s.world_model == "oracle" or s.references or s.beta or s.reward == "official":
        raise ValueError("--world_model oracle, --references, --beta and --reward official are "
                         "for rollouts, not for offline")
    s.reward = "srpo" if s.weights in ("progress", "rabc") else "binary"
