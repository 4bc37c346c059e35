"""What README says works: its example runs, its links and its tree are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 1
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(blocks[0], "README.md", "exec"), names)  # noqa: S102  (our own README)
    assert {path.name for path in tmp_path.iterdir()} >= {"pruned.safetensors", "pruned.onnx"}
    assert re.search(r"\d\.\d+ ms$", capsys.readouterr().out.strip())


@pytest.mark.parametrize(
    "path", [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")], ids=lambda p: p.name
)
def test_links_between_pages_hold(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_the_tree_names_what_exists() -> None:
    tree = README.partition("## Where things are")[2]
    package = False
    for line in re.findall(r"^( *\S+/?) {2,}", tree, re.MULTILINE):
        package = package or line.startswith("  ")
        base = ROOT / "src" / "bevel" if package else ROOT
        name = line.strip()
        assert (base / name).exists() or (base / f"{name}.py").exists(), name
