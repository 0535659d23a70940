"""The rules of the house: rooms and their owners, sizes, imports between rooms, and old names."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("calm_serve", "deployments", "load_tests", "tests")

OWNERS = ("router", "SLM replica", "knowledge actor", "command line", "launcher", "any")

MAX_MODULES = 14
MAX_FUNCTION_LINES = 50
MAX_CLASS_LINES = 250
# Modules that may be imported past their room's `__init__`, each with its reason.
DIRECT_IMPORTS = {
    "calm_serve.cli.main": "the command line's entry point, a function of the module's name",
    "calm_serve.protocol.answers": "each process imports the records that it exchanges",
    "calm_serve.protocol.formats": "each process imports the records that it exchanges",
    "calm_serve.protocol.outcomes": "each process imports the records that it exchanges",
    "calm_serve.protocol.reports": "each process imports the records that it exchanges",
    "calm_serve.protocol.topics": "each process imports the records that it exchanges",
}

# Modules that one module imports and no test, each with its reason (decisions/0035).
ONE_IMPORTER = {
    "a command": """
        calm_serve.cli.goals calm_serve.cli.predictors calm_serve.cli.probe calm_serve.cli.replay
        calm_serve.cli.tables
        deployments.reference_fleet.training.train""",
    "an endpoint": """
        deployments.router.admin.documentation deployments.router.admin.residency
        deployments.router.completions""",
    "private interfaces of vLLM": """
        deployments.slm.engine.engine deployments.slm.engine.forked_core
        deployments.slm.engine.metrics deployments.slm.engine.sleep""",
    "architectures and settings, which are data": "deployments.reference_fleet.training.shapes",
    "what the knowledge service feeds with outcomes": "calm_serve.knowledge.learner",
    "an experiment of its own in a benchmark": """
        load_tests.decision.lightgbm_calls load_tests.paper.changes.benchmark
        load_tests.paper.changes.operator load_tests.paper.changes.parts
        load_tests.paper.simulated.hours load_tests.paper.simulated.residency""",
}
DRAWS = "plots"  # measuring needs no matplotlib

# Modules of the tree before the rooms, by their package; without those whose path is in use today.
OLD_MODULES = {
    "calm_serve": """
        analyze cli_goals cli_learning cli_text config_base config_goals config_load
        config_residency execute loop monitor plan""",
    "calm_serve.knowledge": """
        board champion decisions evaluation gate goal_book holdout labels live_evidence models
        newcomer_desk newcomers probation promotion prompt_mix quality replay replica_book
        residency_desk retrain roster scores settings shadow steps trainer training_desk validators
        watch""",
    "deployments": """
        announcer answering cluster_ports dispatch endings energy engine engine_arguments
        engine_metrics engine_sleep environment exposition fleet_view forked_core goals handles
        haproxy holding host http knowledge_client live metric_table metrics operations outcomes
        predictors remote replica_router residency residency_client residency_endpoint
        residency_samples resident_adapter tier tier_orders tier_view watch_samples watch_view""",
    "load_tests": """
        arrivals asking decision_lightgbm decision_plots decision_world direct ending fit_predictor
        fleet_operator fleet_plots fleet_summary load overhead_plots paper_adaptation paper_answers
        paper_call paper_changes paper_changes_figures paper_changes_parts paper_changes_plots
        paper_figures paper_hours paper_live paper_memory paper_newcomers paper_plots
        paper_residency paper_runs paper_scenarios paper_simulated paper_simulated_plots
        paper_traffic paper_world peers_ray prefix_live prefix_plots prefix_policies prefix_routers
        prefix_simulation prefix_world report routing_plots scale_curves scale_plots scale_router
        scale_simulation scale_staleness scale_state served short_prompts sse throughput_plots
        throughput_runs workloads""",
}

# Words of identifiers that were this project's own and are in no textbook.
OLD_WORDS = """
    answering board book desk ending endings exposition forgone gate heard holding home homes
    hopeful newcomer newcomers nobody occupant occupants orders probation refusal refusals
    roster said shelf somebody told whoever worth yields"""
# Identifiers whose words are ordinary ones.
OLD_NAMES = """
    Announcer Final FleetMonitor GoalBook Loop OneRow OutcomeSender Paper QualityCorrection
    ReplicaBook ReplicaWindows ResidencyClient Room SLMWindow SelectorWatch TierView Watch
    WatchView Words calm_held_requests calm_slm_quality_factor decide_context from_anywhere
    held_requests keeps_its_word language_words load_met quality_factors read_words
    set_quality_factors terms_of want word_buckets word_hashes"""

METRIC_NAME = re.compile(r"(ray_)?calm_[a-z0-9_]+")


@cache
def files() -> dict[str, ast.Module]:
    """Return every Python file, parsed, by its path from the root."""
    paths = sorted(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py"))
    return {str(p.relative_to(ROOT)): ast.parse(p.read_text(encoding="utf-8")) for p in paths}


def rooms(*folders: str) -> list[str]:
    """Return packages below `folders`, without the folders themselves."""
    found = (p.parent for f in folders for p in (ROOT / f).rglob("__init__.py"))
    return sorted(str(r.relative_to(ROOT)) for r in found if r.parent != ROOT)


def imports(tree: ast.Module) -> Iterator[tuple[str, list[str]]]:
    """Yield each imported module with the names taken from it; none for `import module`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, [alias.name for alias in node.names]


def source_of(module: str, name: str) -> str:
    """Return the module that `name` of `module` comes from, through a room's `__init__`."""
    file = module.replace(".", "/")
    if f"{file}/{name}.py" in files():
        return f"{module}.{name}"
    for source, names in imports(files().get(f"{file}/__init__.py", ast.parse(""))):
        if name in names:
            return source
    return module


def importers() -> dict[str, set[str]]:
    """Return the files that import each module; a room's `__init__` only passes names on."""
    found: dict[str, set[str]] = {}
    for file, tree in files().items():
        if not file.endswith("/__init__.py"):
            for module, names in imports(tree):
                for name in names:
                    found.setdefault(source_of(module, name), set()).add(file)
    return found


def public(room: str) -> list[str]:
    """Return `__all__` of a room."""
    for node in files()[f"{room}/__init__.py"].body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return []


def identifiers(file: str, tree: ast.Module) -> Iterator[str]:
    """Yield names in code: of the module, and defined, used, imported or passed in it.

    Fields of records and configuration sections are among them, and metric names, in strings.
    Other strings may be stored formats. A module that names are imported from is not among them:
    `prometheus_client.exposition` is the library's word.
    """
    yield Path(file).stem
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and METRIC_NAME.fullmatch(str(node.value)):
            yield str(node.value)
        for field in ("id", "attr", "name", "arg", "asname"):
            if isinstance(name := getattr(node, field, None), str):
                yield from name.split(".")


def words(name: str) -> set[str]:
    """Return the words of an identifier in lower case."""
    return {w.lower() for w in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z0-9]+", name)}


@pytest.mark.parametrize("room", rooms("calm_serve", "deployments"))
def test_a_room_names_its_owner_and_whether_it_may_block(room: str) -> None:
    first = (ast.get_docstring(files()[f"{room}/__init__.py"]) or "").partition("\n")[0]
    owner = re.search(r"Owner: ([^.;]+)[.;]", first)
    assert owner, first
    assert owner[1].startswith(OWNERS), owner[1]
    assert re.search(r"\bblocks?\b", first, re.IGNORECASE), first


@pytest.mark.parametrize("room", rooms(*FOLDERS))
def test_a_room_holds_few_modules(room: str) -> None:
    modules = [f for f in files() if f.rpartition("/")[0] == room and "__init__" not in f]
    assert len(modules) <= MAX_MODULES


def test_functions_and_classes_are_short() -> None:
    long = set()
    for file, tree in files().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                limit = MAX_CLASS_LINES if isinstance(node, ast.ClassDef) else MAX_FUNCTION_LINES
                if (node.end_lineno or 0) - node.lineno + 1 > limit:
                    long.add(f"{file}:{node.name}")
    assert not long, "\n".join(sorted(long))


def test_a_room_of_the_core_is_imported_through_its_public_names() -> None:
    past: set[tuple[str, str]] = set()
    for file, tree in files().items():
        for module, names in imports(tree):
            top, _, below = module.partition(".")
            room = f"{top}/{below.partition('.')[0]}"
            # A test may import the modules that it tests.
            if room not in rooms("calm_serve") or file.startswith((f"{room}/", "tests/")):
                continue
            taken = {f"{module}.{name}" for name in names if name not in public(room)}
            past |= {(file, m) for m in ({module} if "." in below else taken) - set(DIRECT_IMPORTS)}
    assert not past, sorted(past)


def test_a_module_with_one_importer_has_tests_of_its_own_or_a_reason() -> None:
    single = {
        module
        for module, used_by in importers().items()
        if len(used_by) == 1
        and f"{module.replace('.', '/')}.py" in files()
        and not module.startswith("tests.")
        and not module.endswith(f".{DRAWS}")
        and not next(iter(used_by)).startswith("tests/")
    }
    assert single == set(" ".join(ONE_IMPORTER.values()).split())


def test_old_names_do_not_return() -> None:
    old, listed = set(OLD_NAMES.split()), set(OLD_WORDS.split())
    found = {
        f"{file}: {name}"
        for file, tree in files().items()
        for name in identifiers(file, tree)
        if name in old or words(name) & listed
    }
    assert not found, "\n".join(sorted(found))


@pytest.mark.parametrize("package", OLD_MODULES)
def test_old_modules_do_not_return(package: str) -> None:
    """Strings count too: commands and import paths are written in them."""
    old = "|".join(OLD_MODULES[package].split())
    pattern = re.compile(rf"\b{re.escape(package)}(?:\.(?:{old})\b|/(?:{old})\.py\b)")
    found = set()
    for file, tree in files().items():
        texts = [module for module, _ in imports(tree)]
        texts += [f"{m}.{n}" for m, names in imports(tree) for n in names if m == package]
        texts += [str(n.value) for n in ast.walk(tree) if isinstance(n, ast.Constant)]
        found |= {f"{file}: {match[0]}" for text in texts for match in pattern.finditer(text)}
    assert not found, "\n".join(sorted(found))
