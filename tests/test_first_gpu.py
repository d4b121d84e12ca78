"""The script that is run first on a new GPU, on this CPU: it says ok, and BAD where it should."""

from typing import Any

import pytest
from helpers import script

import model as lm


def test_every_check_is_ok_here(capsys: pytest.CaptureFixture[str]) -> None:
    checks = script("first_gpu")
    status = checks.main([])
    lines = capsys.readouterr().out.splitlines()
    assert status == 0, [line for line in lines if line.startswith("BAD")]
    assert "no GPU" in lines[0] and all(line.startswith(("ok  ", "     ")) for line in lines[1:])
    for name in checks.CHECKS:
        assert any(line.startswith(f"     {name}: ") for line in lines)


def test_a_broken_path_and_a_check_that_raises_are_bad(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checks, attention = script("first_gpu"), lm.varlen_attn

    def forgets_windows(*args: Any, window_size: Any, **more: Any) -> Any:
        return attention(*args, window_size=(-1, 0), **more)

    monkeypatch.setattr(lm, "varlen_attn", forgets_windows)
    assert checks.main(["packed"]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if "error over" in line]
    assert [line[:4] for line in lines] == ["ok  ", "ok  ", "BAD ", "BAD "]
    monkeypatch.setattr(checks, "by_hand", lambda *parts: 1 / 0)
    assert checks.main(["kernel", "golden"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("BAD  kernel: ZeroDivisionError") for line in lines)
    assert any(line.startswith("ok   golden") for line in lines)
