"""What the documents show is true: examples parse, commands and endpoints exist, docstrings run."""

import doctest
import importlib
import pkgutil
import re
import shlex
from pathlib import Path

import httpx
import pytest
import yaml

import calm_serve
from calm_serve.cli.main import World, main
from calm_serve.config import Goals, ResidencyOptions, SLMSpec
from calm_serve.config.loading import load_args, load_fleet
from calm_serve.learning.model_registry import SHIPPED_FILE
from calm_serve.prediction import load_artifact
from calm_serve.requests import ROUTES
from load_tests.__main__ import BENCHMARKS
from tests.chat_service import ChatService

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DECISIONS = ROOT / "calm_serve" / "decisions"
DOCUMENTS = (
    ROOT / "README.md",
    ROOT / "calm_serve" / "README.md",
    ROOT / "deployments" / "README.md",
    ROOT / "deployments" / "reference_fleet" / "README.md",
    *sorted(DECISIONS.glob("*.md")),
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_every_fleet_entry_in_the_readme_is_valid() -> None:
    entries = [e for b in blocks("yaml") for e in yaml.safe_load(b).get("slms", ())]
    assert len(entries) >= 2
    for entry in entries:
        SLMSpec.model_validate(entry)


def test_every_added_application_in_the_readme_is_one_slm() -> None:
    apps = [a for b in blocks("yaml") for a in yaml.safe_load(b).get("applications", ())]
    assert apps
    for app in apps:
        assert app["import_path"] == "deployments.app:build_slm"
        SLMSpec.model_validate(app["args"])


def test_the_commands_for_own_data_in_the_readme_run_on_files_that_ship(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = [
        shlex.split(line)[1:]
        for block in blocks("sh")
        for line in block.splitlines()
        if line.startswith(("calm eval ", "calm fit ", "calm fleet probe "))
    ]
    assert [command[0] for command in commands] == ["eval", "fit", "fleet"]
    (tmp_path / "load_tests").symlink_to(ROOT / "load_tests")
    monkeypatch.chdir(tmp_path)
    world = World(transport=httpx.ASGITransport(ChatService()))
    for command in commands:
        assert main(command, world) == 0
    assert {"figures.json", "curve.png", "my_table.jsonl"} <= {p.name for p in tmp_path.iterdir()}
    (entry,) = (b for b in blocks("yaml") if "predictor: my_predictor" in b)
    (tmp_path / "fleet.yaml").write_text(entry, encoding="utf-8")
    fleet = load_fleet(tmp_path / "fleet.yaml")
    predictor = load_artifact(Path(fleet.predictor) / SHIPPED_FILE)
    assert set(predictor.slm_ids) == {slm.id for slm in fleet.slms}


def test_every_section_of_arguments_in_the_readme_is_valid() -> None:
    documents = [yaml.safe_load(b) for b in blocks("yaml")]
    assert [Goals.model_validate(d["goals"]) for d in documents if "goals" in d]
    assert [ResidencyOptions.model_validate(d["residency"]) for d in documents if "residency" in d]


def test_every_make_target_in_the_readme_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    used = set(re.findall(r"\bmake ([a-z]+)\b", " ".join(blocks("sh"))))
    assert {"serve", "test"} <= used
    for target in used:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_endpoint_in_the_readme_is_served() -> None:
    source = (ROOT / "deployments" / "router" / "deployment.py").read_text(encoding="utf-8")
    for path in set(re.findall(r"`(?:GET|POST|PUT) (/[a-z/0-9]+)", README)):
        assert path in ROUTES or path.rstrip("/") in source, path


def test_every_route_that_an_slm_answers_is_in_the_readme() -> None:
    missing = [path for path in ROUTES if f"`{path}`" not in README and f" {path}`" not in README]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_local_link_in_the_documents_exists(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for link, heading in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", text):
        if link.startswith("http"):
            continue
        target = document.parent / link if link else document
        assert target.exists(), link
        if heading:
            assert heading in headings(target.read_text(encoding="utf-8")), f"{link}#{heading}"


def headings(text: str) -> set[str]:
    """Anchors as Markdown makes them: lower case, blanks to hyphens, signs left out."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_path_in_the_documents_exists(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for path in re.findall(r"`((?:calm_serve|deployments|load_tests|tests)/[\w./-]*)`", text):
        assert (ROOT / path).exists(), path


def test_every_decision_is_in_the_index_with_its_title_and_status() -> None:
    index = (DECISIONS / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[(\d{4})\]\((\S+)\) \| (.*) \| (\w+) \|$", index, re.MULTILINE)
    pages = sorted(p for p in DECISIONS.glob("*.md") if p.name != "README.md")
    assert [name for _, name, _, _ in rows] == [p.name for p in pages]
    for (number, name, title, status), page in zip(rows, pages, strict=True):
        lines = page.read_text(encoding="utf-8").splitlines()
        assert name.startswith(f"{number}-")
        assert lines[0] == f"# {number}. {title}"
        assert lines[2].startswith(f"Status: {status}")


def test_every_benchmark_in_the_readme_exists_and_all_are_named() -> None:
    named = set(re.findall(r"`python -m load_tests ([a-z]+)", README))
    assert named == set(BENCHMARKS)


def test_the_shipped_configuration_is_valid() -> None:
    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text(encoding="utf-8"))
    (application,) = config["applications"]
    _, fleet = load_args(application["args"], ROOT)
    assert {s.id for s in fleet.slms} >= {"extract", "sql", "shell", "reason", "intent", "general"}


@pytest.mark.parametrize("path", sorted((ROOT / "deployments" / "fleets").glob("*.yaml")), ids=str)
def test_every_fleet_file_is_valid(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in re.findall(r"model: models:(\S+)", path.read_text(encoding="utf-8")):
        folder = tmp_path / name  # `make weights` has not run on every machine
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
        (folder / "model.safetensors").write_bytes(b"")
    monkeypatch.setenv("CALM_MODELS_DIR", str(tmp_path))
    assert load_fleet(path).slms


def test_docstring_examples_run() -> None:
    attempted = 0
    for info in pkgutil.walk_packages(calm_serve.__path__, "calm_serve."):
        result = doctest.testmod(importlib.import_module(info.name))
        assert result.failed == 0, info.name
        attempted += result.attempted
    assert attempted > 0
