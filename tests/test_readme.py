"""What the documents say: commands, links, the support matrix and the code in them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from perceiver_kernels import dispatch, support_matrix

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def read(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def relative_links(document: Path) -> list[str]:
    """The targets of links and pictures that are not addresses, fragments included."""
    targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", read(document), flags=re.DOTALL))
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def anchors(document: Path) -> set[str]:
    """What a link may name of a document: its headings, spelt as GitHub spells them."""
    headings = re.findall(r"^#+ (.+)$", read(document), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def python_blocks(document: Path) -> str:
    return "\n".join(re.findall(r"^```python\n(.*?)^```", read(document), flags=re.DOTALL | re.MULTILINE))


def test_support_matrix_is_what_the_declarations_say() -> None:
    text = read(README)
    assert support_matrix.rewritten(text) == text, "run python -m perceiver_kernels.support_matrix --write README.md"


def test_support_matrix_has_every_op_and_backend() -> None:
    matrix = support_matrix.markdown()
    for declaration in dispatch.declarations():
        assert re.search(rf"\| `{declaration.op}` +\| +{declaration.backend} \|", matrix)
    for backend in dispatch.BACKENDS:
        assert backend in matrix


def test_support_matrix_replaces_only_its_block(tmp_path: Path) -> None:
    document = tmp_path / "document.md"
    document.write_text(f"before\n{support_matrix.BEGIN}\nstale\n{support_matrix.END}\nafter\n", encoding="utf-8")
    support_matrix.main(["--write", str(document)])
    text = read(document)
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "stale" not in text
    assert support_matrix.markdown() in text


def test_support_matrix_without_markers_is_an_error() -> None:
    with pytest.raises(ValueError, match="no block between"):
        support_matrix.rewritten("nothing here")


@pytest.mark.parametrize("command", ["make demo", "make test", "benchmarks/run.py --bars"])
def test_readme_names_the_commands(command: str) -> None:
    assert command in read(README)


@pytest.mark.parametrize("target", ["demo", "test", "bench", "lint", "format"])
def test_make_has_the_commands(target: str) -> None:
    assert re.search(rf"^{target}:", read(ROOT / "Makefile"), flags=re.MULTILINE)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_relative_links_lead_somewhere(document: Path) -> None:
    for link in relative_links(document):
        path, _, fragment = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), f"{document.name} links to {link}, which does not exist"
        if fragment:
            assert fragment in anchors(target), f"{document.name} links to {link}, and there is no such heading"


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if python_blocks(d)], ids=lambda document: document.name)
def test_code_in_documents_runs(document: Path) -> None:
    exec(compile(python_blocks(document), str(document), "exec"), {})
