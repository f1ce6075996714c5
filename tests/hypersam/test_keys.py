"""API keys and the settings that carry them."""

from __future__ import annotations

import json
from hmac import compare_digest
from pathlib import Path

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from hypersam.cli.main import app
from hypersam.errors import InvalidOption
from hypersam.keys import PREFIX, find_key, hash_of, new_key, parse_line, parse_lines
from hypersam.settings import Settings


def test_a_key_is_found_by_what_was_shown_and_by_nothing_else() -> None:
    made = [new_key(f"k{n}", ["segment"]) for n in range(20)]
    keys = [key for _, key in made]
    assert len({secret for secret, _ in made}) == 20
    for secret, key in made:
        assert secret.startswith(PREFIX)
        assert len(secret) >= 43
        assert secret not in key.line()
        assert find_key(keys, secret) == key == parse_line(key.line())
        assert find_key(keys, key.sha256) is None
        assert find_key(keys, secret[:-1]) is None
    assert find_key(keys, "") is None
    assert find_key((), made[0][0]) is None


def test_every_hash_is_compared_and_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times cannot be asserted; that the comparison is the one made for this, and does not stop at a match, can."""
    made = [new_key(f"k{n}", ["segment"]) for n in range(5)]
    compared = []

    def compare(one: str, other: str) -> bool:
        compared.append(one)
        return compare_digest(one, other)

    monkeypatch.setattr("hypersam.keys.hmac.compare_digest", compare)
    for secret in (made[0][0], made[4][0], "none"):
        compared.clear()
        find_key([key for _, key in made], secret)
        assert compared == [key.sha256 for _, key in made]


def test_scopes() -> None:
    _, key = new_key("a", ["segment", "compress"])
    assert key.line() == f"a:compress+segment:{key.sha256}"
    assert key.may("segment")
    assert not key.may("admin")
    _, admin = new_key("b", ["admin"])
    assert all(admin.may(scope) for scope in ("compress", "segment", "admin"))


@pytest.mark.parametrize("line", ["", "a", "a:segment", "a:root:" + "0" * 64, ":segment:" + "0" * 64, "a::" + "0" * 64,
                                  "a:segment:" + "0" * 63, "a b:segment:" + "0" * 64, PREFIX + "secret"])  # fmt: skip
def test_lines_that_are_no_keys_are_not_repeated(line: str) -> None:
    with pytest.raises(ValueError, match="scope") as caught:
        parse_line(line)
    assert "secret" not in str(caught.value)
    with pytest.raises(ValidationError) as refused:
        Settings(api_keys=(line,))
    assert "secret" not in str(refused.value)


def test_a_file_of_keys(tmp_path: Path) -> None:
    first, second = (new_key(label, ["segment"])[1] for label in ("a", "b"))
    text = f"# who may\n\n{first.line()}\n  {second.line()}  \n"
    assert parse_lines(text) == (first, second)
    with pytest.raises(ValueError, match="line 2"):
        parse_lines(f"{first.line()}\nnonsense\n")
    path = tmp_path / "keys"
    path.write_text(text)
    third = new_key("c", ["admin"])[1]
    settings = Settings(api_keys=(third.line(),), api_keys_file=path)
    assert settings.keys() == (third, first, second)
    for broken in ("", "# nothing\n", "nonsense"):
        path.write_text(broken)
        with pytest.raises(InvalidOption, match="HYPERSAM_API_KEYS_FILE"):
            settings.keys()
    path.unlink()
    with pytest.raises(InvalidOption, match="HYPERSAM_API_KEYS_FILE"):
        settings.keys()


def test_a_child_process_gets_the_same_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(api_keys=(new_key("a", ["segment"])[1].line(),), cors_origins=("https://example.org",),
                        rate_limit="5/second")  # fmt: skip
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)
    assert Settings().model_dump(exclude={"data_dir"}) == settings.model_dump(exclude={"data_dir"})


@pytest.mark.parametrize("given", [{"rate_limit": "often"}, {"rate_limit": "0/second"}, {"cors_origins": ("*",)},
                                   {"cors_origins": ("example.org",)}, {"cors_origins": ("https://a/b",)}])  # fmt: skip
def test_settings_that_make_no_sense(given: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Settings(**given)


def test_the_command_prints_a_key_and_its_line() -> None:
    arguments = ["keys", "new", "--scope", "segment", "--scope", "compress", "--label", "ci", "--json"]
    run = CliRunner().invoke(app, arguments)
    assert run.exit_code == 0, run.output
    made = json.loads(run.output)
    key = parse_line(made["line"])
    assert (key.label, key.scopes, key.sha256) == ("ci", {"segment", "compress"}, hash_of(made["key"]))
    assert CliRunner().invoke(app, ["keys", "new", "--scope", "root"]).exit_code == 2
    plain = CliRunner().invoke(app, ["keys", "new", "--scope", "admin"]).output
    assert PREFIX in plain
    assert "HYPERSAM_API_KEYS" in plain
