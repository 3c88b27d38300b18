"""Wrong settings are refused at start-up, by name."""

import pytest
from pydantic import ValidationError

from app.errors import SettingsError
from app.settings import Settings, children_environment, load

URL = "postgresql://user:secret@127.0.0.1/proctor"
INSTANCE = "projects/p/locations/us-central1/clusters/c/instances/i"


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("PROCTOR_POOL_SIZE", "0", "greater than or equal to 1 (it is '0')"),
        ("PROCTOR_LEASE", "two minutes", "valid number"),
        ("PROCTOR_QUEUE", "queue", "pattern"),
        ("PROCTOR_QUEUE_ENDPOINT", "127.0.0.1", "pattern"),
        ("PROCTOR_DISPATCH_DEADLINE", "3600", "less than or equal to 1800"),
        ("PROCTOR_SERVICE_URL", "proctor.example", "http or https"),
        ("PROCTOR_ARTIFACTS", "s3://bucket", "gs://bucket/path or file://path"),
        ("PROCTOR_ARTIFACTS", "file:///a/\udcff", "UTF-8"),
        ("PROCTOR_PORT", "99999", "65535"),
        ("PROCTOR_LEASE", "20", "PROCTOR_STATEMENT_TIMEOUT must be shorter than PROCTOR_LEASE"),
        ("PROCTOR_POOL_SZE", "5", "there is no such setting"),
        ("PROCTOR_AUTH", "basic", "'iam', 'oidc' or 'none'"),
        ("PROCTOR_CALLERS", "a@example.com,,b@example.com", "empty entry"),
        ("PROCTOR_CALLERS", '["a@example.com"]', "not an e-mail"),
        ("PROCTOR_CALLERS", "*", "nor a domain as @example.com"),
        ("PROCTOR_CALLERS", "*@example.com", "'*@example.com' is not an e-mail"),
        ("PROCTOR_CALLERS", "example.com", "nor a domain as @example.com"),
        ("PROCTOR_CALLERS", "@localhost", "nor a domain as @example.com"),
        ("PROCTOR_CALLERS", "a@b@example.com", "not an e-mail"),
        ("PROCTOR_CALLERS", "a@example.com b@example.com", "not an e-mail"),
        ("PROCTOR_CALLERS", "@gmail.com", "would admit anybody"),
        ("PROCTOR_CALLERS", "@Developer.gserviceaccount.com", "would admit anybody"),
        ("PROCTOR_PUSH_CALLERS", "@example.com", "not an e-mail"),
        ("PROCTOR_ALLOWED_TASKS", ",", "empty entry"),
        (
            "PROCTOR_DATABASE_URL",
            f"{URL}?channel_binding=require&sslmode=require",
            "asyncpg knows nothing of channel_binding",
        ),
        ("PROCTOR_DATABASE_URL", f"{URL}?connect_timeout=3", "connect_timeout is set by PROCTOR_CONNECT_TIMEOUT"),
        ("PROCTOR_DATABASE_URL", f"{URL}?sslmode", "what follows `?` cannot be read"),
        ("PROCTOR_DATABASE_URL", "postgresql://u@host:port/name", "its port or what follows"),
        ("PROCTOR_ALLOWED_QUEUES", "openai,projects/p/locations/l/queues/q", "not a queue's own name"),
        ("PROCTOR_ALLOWED_SANDBOXES", "proctor,docker", "'docker' can never match: docker cannot run here"),
        ("PROCTOR_ALLOWED_SANDBOXES", "proctor k8s", "'proctor k8s' can never match: a sandbox is named by letters"),
        ("PROCTOR_ALLOWED_SANDBOXES", "sandbox:proctor", "entries are parted by commas"),
        ("PROCTOR_ALLOWED_SANDBOXES", "Proctor", "did you mean 'proctor'?"),
        ("PROCTOR_ALLOWED_SANDBOXES", "proctr,k8s", "did you mean 'proctor'?"),
        ("PROCTOR_OIDC_CERTS_URL", "file:///etc/certs", "http or https"),
    ],
)
def test_a_wrong_value_is_refused_with_the_variable_s_name(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, says: str
) -> None:
    monkeypatch.setenv("PROCTOR_DATABASE_URL", URL)
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as refused:
        load()
    assert name in str(refused.value)
    assert says in str(refused.value)


def test_all_wrong_variables_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROCTOR_POOL_SIZE", "many")
    monkeypatch.setenv("PROCTOR_LOG_LEVEL", "loud")
    with pytest.raises(SettingsError) as refused:
        load()
    for name in (
        "PROCTOR_POOL_SIZE",
        "PROCTOR_LOG_LEVEL",
        "PROCTOR_ALLOYDB_INSTANCE: is required, or else PROCTOR_DATABASE_URL",
    ):
        assert name in str(refused.value)


def test_parameters_that_the_driver_or_the_server_knows_are_taken() -> None:
    load(
        database_url=f"{URL}?sslmode=require&target_session_attrs=read-write&application_name=x&search_path=a&options=-c%20b=1"
    )


def test_a_database_url_that_is_wrong_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROCTOR_DATABASE_URL", "mysql://user:secret@host/name")
    with pytest.raises(SettingsError) as refused:
        load()
    assert "PROCTOR_DATABASE_URL" in str(refused.value)
    assert "secret" not in str(refused.value)
    assert "secret" not in repr(load(database_url=URL))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"ALLOYDB_INSTANCE": "projects/p/instances/i"}, "PROCTOR_ALLOYDB_INSTANCE: string should match pattern"),
        ({"ALLOYDB_INSTANCE": INSTANCE}, "PROCTOR_ALLOYDB_USER: is required with PROCTOR_ALLOYDB_INSTANCE"),
        ({"ALLOYDB_INSTANCE": INSTANCE, "DATABASE_URL": URL}, "must not be set together with PROCTOR_DATABASE_URL"),
        (
            {"ALLOYDB_INSTANCE": INSTANCE, "ALLOYDB_USER": "u", "ALLOYDB_IP_TYPE": "LOCAL"},
            "'PRIVATE', 'PUBLIC' or 'PSC'",
        ),
        ({"ALLOYDB_INSTANCE": INSTANCE, "ALLOYDB_USER": "u", "ALLOYDB_ENDPOINT": "host"}, "PROCTOR_ALLOYDB_ENDPOINT"),
        ({}, "PROCTOR_ALLOYDB_INSTANCE: is required, or else PROCTOR_DATABASE_URL"),
    ],
)
def test_there_is_one_database_and_it_is_whole(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], says: str
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(f"PROCTOR_{name}", value)
    with pytest.raises(SettingsError) as refused:
        load()
    assert says in str(refused.value)
    assert "secret" not in str(refused.value)


def test_the_database_is_named_without_its_password() -> None:
    assert load(database_url=URL).database == "database proctor at 127.0.0.1:5432 as user"
    settings = load(alloydb_instance=INSTANCE, alloydb_user="worker", alloydb_password="secret")
    assert settings.database == f"database proctor of {INSTANCE} as worker"
    assert "secret" not in repr(settings)


def test_the_pool_is_the_story_s() -> None:
    settings = load(database_url=URL)
    assert (settings.pool_recycle, settings.pool_pre_ping, settings.pool_timeout) == (180, True, 30)
    assert (settings.pool_size, settings.max_overflow) == (5, 10)


@pytest.mark.parametrize("patterns", ["proctor,local", "*", "k8s,modal", "inspect_[a-z]*", "proctor,ec2-*"])
def test_sandboxes_that_a_package_may_bring_are_allowed(monkeypatch: pytest.MonkeyPatch, patterns: str) -> None:
    monkeypatch.setenv("PROCTOR_DATABASE_URL", URL)
    monkeypatch.setenv("PROCTOR_ALLOWED_SANDBOXES", patterns)
    assert load().allowed_sandboxes == tuple(patterns.split(","))


def test_the_service_s_own_queue_comes_first_among_those_that_a_spec_may_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROCTOR_DATABASE_URL", URL)
    monkeypatch.setenv("PROCTOR_QUEUE", "projects/p/locations/l/queues/own")
    monkeypatch.setenv("PROCTOR_ALLOWED_QUEUES", "openai,own,anthropic")
    assert load().queues == ("own", "openai", "anthropic")
    assert load().queue_called("openai") == "projects/p/locations/l/queues/openai"
    assert load().queue_called(None) == "projects/p/locations/l/queues/own"


def test_lists_are_separated_by_commas_and_people_compared_in_small_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROCTOR_CALLERS", "Alice@Example.com, @staff.example")
    monkeypatch.setenv("PROCTOR_PUSH_CALLERS", "cron@p.iam.gserviceaccount.com")
    monkeypatch.setenv("PROCTOR_ALLOWED_MODELS", "openai/*,mockllm/model")
    settings = load(database_url=URL, queue_service_account="Queue@p.iam.gserviceaccount.com")
    assert settings.callers == ("alice@example.com", "@staff.example")
    assert settings.pushers == {"cron@p.iam.gserviceaccount.com", "queue@p.iam.gserviceaccount.com"}
    assert (settings.allowed_tasks, settings.allowed_models) == (("*",), ("openai/*", "mockllm/model"))


def test_tokens_are_for_the_queue_s_audience_or_else_the_service() -> None:
    def audiences(**given: object) -> tuple[str, ...]:
        return load(database_url=URL, service_url="https://s.example", **given).accepted_audiences

    assert audiences() == ("https://s.example",)
    assert audiences(queue_audience="q") == ("q",)
    assert audiences(audiences=("a", "b")) == ("a", "b")
    assert audiences(audiences="a,b", queue_service_account="q@p.iam.gserviceaccount.com") == (
        "a",
        "b",
        "https://s.example",
    )


def test_the_client_s_variables_are_not_misspelt_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROCTOR_URL", "https://s.example")
    monkeypatch.setenv("PROCTOR_TOKEN", "x.y.z")
    load(database_url=URL)


def test_settings_cannot_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load(database_url=URL).lease = 1  # type: ignore[misc]  # the point


def test_cloud_run_s_own_variables_are_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "9999")
    monkeypatch.setenv("K_REVISION", "proctor-00042")
    monkeypatch.setenv("K_SERVICE", "proctor")
    settings = load(database_url=URL)
    assert (settings.port, settings.revision) == (9999, "proctor-00042")
    monkeypatch.setenv("PROCTOR_CLOUD_RUN_SERVICE", "")
    assert load(database_url=URL).cloud_run_service == "proctor", "nothing overrides what the platform says"


def test_every_setting_says_what_it_is() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


def test_children_get_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROCTOR_DATABASE_URL", URL)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    environment = children_environment()
    assert environment["OPENAI_API_KEY"] == "sk-1"
    assert not [name for name in environment if name.startswith("PROCTOR_")]
