"""Every broken spec beside this file is refused with the message beside it, word for word."""

from __future__ import annotations

from pathlib import Path

import pytest

from tensorpeft.language.errors import SpecError
from tensorpeft.language.loader import load_spec

HERE = Path(__file__).parent
BROKEN = sorted(HERE.glob("*.yaml"))


@pytest.mark.parametrize("path", BROKEN, ids=lambda path: path.stem)
def test_message(path: Path, update_golden: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)
    with pytest.raises(SpecError) as caught:
        load_spec(Path(path.name))
    message = f"{caught.value}\n"
    if update_golden:
        path.with_suffix(".txt").write_text(message, encoding="utf-8")
    assert message == path.with_suffix(".txt").read_text(encoding="utf-8")
    assert all(problem.span for problem in caught.value.problems)


def test_every_message_has_its_spec() -> None:
    assert len(BROKEN) >= 60
    assert {path.stem for path in BROKEN} == {path.stem for path in HERE.glob("*.txt")}
