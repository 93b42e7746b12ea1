"""What paper 2 needs besides the algorithm. A policy or a simulator is one class or function in a
file of its own, and one line here."""
from pkgutil import resolve_name

from robots.suite import Suite, SuiteOptions

POLICIES = {"openvla": "robots.openvla:OpenVLA",        # by model_type of config.json
            "tiny_vla": "robots.tiny_vla:TinyVLA"}
SUITES = {"tabletop": "robots.tabletop:suite",          # by the name's first word
          "libero": "robots.libero:suite"}


def policy_class(model_type: str):
    """ValueError, one line, for an unknown one."""
    if model_type not in list(POLICIES):                # a damaged file may hold a list there
        raise ValueError(f"{model_type!r:.60} is no policy here; there are {', '.join(POLICIES)}")
    return resolve_name(POLICIES[model_type])


def find_suite(name: str, tasks: tuple[int, ...] = (),
               options: SuiteOptions | None = None) -> Suite:
    """A suite by its name, or some of its tasks by number. ValueError, one line."""
    if len(set(tasks)) < len(tasks):
        raise ValueError(f"--tasks {' '.join(map(str, tasks))}: each once")
    if (kind := name.partition("_")[0]) not in SUITES:
        raise ValueError(f"no suite {name!r}; names begin with {' or '.join(SUITES)}, see --help")
    return resolve_name(SUITES[kind])(name, tasks, options or SuiteOptions())
