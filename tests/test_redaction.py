"""No secret in a record: what is withheld, and what of our own words is left alone."""

from __future__ import annotations

import json

import pytest

from deferral_train import cli, provenance
from deferral_train.errors import InputError
from deferral_train.heads import GapHead
from deferral_train.redaction import is_secret, redacted, redacted_text, redacted_words

SECRET = "hf_AbCdEf0123456789"


@pytest.mark.parametrize(
    "name",
    [
        "token",
        "hf_token",
        "--token",
        "api-key",
        "apiKey",
        "HF_TOKEN",
        "WANDB_API_KEY",
        "AWS_SECRET_ACCESS_KEY",
        "password",
    ],
)
def test_names_of_secrets(name):
    assert is_secret(name)


@pytest.mark.parametrize(
    "name",
    [
        "num_draft_tokens",
        "tokens",
        "tokenizer",
        "token_v3",
        "token_log",
        "pad_token",
        "ms_per_token",
        "key",
        "prompt_field",
    ],
)
def test_words_of_the_field_are_no_secrets(name):
    assert not is_secret(name)


@pytest.mark.parametrize(
    "text",
    [
        f"--token {SECRET}",
        f"--token={SECRET}",
        f"https://user:{SECRET}@host/data.jsonl",
        f"s3://{SECRET}@bucket/x",
        f"https://host/x?api_key={SECRET}&b=1",
        f"Authorization: Bearer {SECRET}",
        f"{{'api_key': '{SECRET}'}}",
        f"command:check --api-key {SECRET}",
        f"failed with {SECRET}: 401",
    ],
)
def test_a_secret_within_a_text_is_withheld(text):
    assert SECRET not in redacted_text(text)
    assert SECRET not in str(InputError(text))


@pytest.mark.parametrize(
    "text",
    [
        "--rules token_v3:alpha=0.2 --num-draft-tokens 5",
        "head: made for another vocabulary (tokenizer is t, the head's another)",
        "rule token_v3: alpha is 7; the dial's range is 0 to 1",
        "prompts: s3://bucket/prompts.jsonl cannot be read",
        "next token: 17",
    ],
)
def test_other_texts_stay_as_they_are(text):
    assert redacted_text(text) == text


def test_an_environment_value_is_withheld_wherever_it_shows(monkeypatch):
    monkeypatch.setenv("MY_SERVICE_TOKEN", "correct horse")
    assert redacted_text("wrong: correct horse") == "wrong: ***"
    assert redacted_words(["run", "--note", "correct horse"])[-1] == "***"


def test_values_by_name_and_numbers_stay():
    record = {
        "token": SECRET,
        "tokens": [1, 2],
        "token_count": 3,
        "deep": [{"password": "x"}],
        "eos_token": "</s>",
    }
    clean = redacted(record)
    assert clean == {
        "token": "***",
        "tokens": [1, 2],
        "token_count": 3,
        "deep": [{"password": "***"}],
        "eos_token": "</s>",
    }


@pytest.mark.parametrize("spelled", [["--token", SECRET], [f"--token={SECRET}"]])
def test_a_token_of_export_reaches_no_file(tmp_path, monkeypatch, capsys, spelled):
    GapHead(["drafter_max", "tv"], hidden=[4]).save_pretrained(tmp_path / "head")
    words = ["export", "--checkpoint", str(tmp_path / "head"), "--out", str(tmp_path / "out"), *spelled]
    monkeypatch.setattr("sys.argv", ["deferral-train", *words])
    assert cli.main(words) == 0
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert tmp_path / "out" / "export.provenance.json" in files
    assert not [path.name for path in files if SECRET.encode() in path.read_bytes()]
    assert SECRET not in "".join(capsys.readouterr())


def test_provenance_and_run_record_withhold(tmp_path, monkeypatch):
    from deferral_train.pipeline.stages import RUN_FILE, open_run

    monkeypatch.setattr(
        "sys.argv", ["deferral-train", "run", "--api-key", SECRET, f"--x=https://a:{SECRET}@h"]
    )
    folder = open_run(tmp_path / "run", {"text": f"https://a:{SECRET}@h/p", "hub_token": SECRET}, fresh=False)
    assert SECRET not in (folder / RUN_FILE).read_text()
    assert SECRET not in json.dumps(provenance.collect())


@pytest.mark.parametrize(
    "text",
    [
        "https://host/x?sig={}", "https://host/x?X-Amz-Signature={}&a=1", "https://host/x?key={}", "s3://b/x?token={}",
        "command:./score -k {}", "command:./score --key {}", "command:./score --pass {}", "command:./score --pwd={}",
        "command:curl -u user:{} http://x", "command:curl -H X-Api-Key:{}", "command:curl -H 'X-Api-Key: {}'",
        'command:./s --header "Cookie: {}"', "command:env OPENAI_API_KEY={} ./score", "command:./s --auth {}",
        "SharedAccessSignature={}", "AccountKey={};EndpointSuffix=x", "Password={};", '{{"token": "{}"}}', "token: {}",
    ],
)  # fmt: skip
def test_more_secrets_within_texts(text):
    assert "S3cretVal1" not in redacted_text(text.format("S3cretVal1"))


@pytest.mark.parametrize(
    "token",
    ["npm_" + "a" * 36, "pypi-" + "A" * 30, "dckr_pat_" + "a" * 20, "ya29." + "a" * 30, "sk-ant-" + "a" * 30,
     "-----BEGIN PRIVATE KEY-----\nMII\n-----END PRIVATE KEY-----"],
)  # fmt: skip
def test_tokens_of_known_forms(token):
    assert redacted_text(f"x {token} y") == "x *** y"


@pytest.mark.parametrize(
    "value",
    [
        {"hf_tokens": ["S3"]}, {"headers": [["X-Api-Key", "S3"]]}, {"auth": ["user", "S3"]}, {"auth": "S3"},
        {"key": "S3", "secret": "x"}, {"password": 3}, {"token": {"value": "S3"}}, {"cookies": {"session": "S3"}},
        {"credentials": {"x": "S3"}}, {"login": {"user": "a", "pass": "S3"}}, {"connection_string": "S3"},
    ],
)  # fmt: skip
def test_more_fields(value):
    assert "3" not in str(redacted(value))


@pytest.mark.parametrize(
    "text",
    ["learned_token:head=x,alpha=0.1", "token:alpha=0.2", "sk-learn-something-model", "one pass: 0.2 s", "author: me",
     "--rules judge:head=F --stop speed:cost=0.1", "key: prompts", "bypass=1", "pad_token: 3"],
)  # fmt: skip
def test_more_texts_that_stay(text):
    assert redacted_text(text) == text


def test_more_names_of_environment_values(monkeypatch):
    for name in ("PGPASSWORD", "MY_SERVICE_PASS", "OPENAI_KEY", "DB_PWD"):
        monkeypatch.setenv(name, f"value of {name}")
        assert redacted_text(f"x value of {name} y") == "x *** y"
    monkeypatch.setenv("PWD", "/some/folder")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/etc/keys.json")
    assert redacted_text("/some/folder /etc/keys.json") == "/some/folder /etc/keys.json"
