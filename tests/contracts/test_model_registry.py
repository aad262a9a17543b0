"""ModelRegistry: ids agree with the spec, entries never change, profiles are checked, sunsets end service."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import boa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poip_chain.spec.objects import ModelConfig, ModelSpec, Profile, ThresholdRow
from poip_chain.spec.scores import threshold
from tests.contracts.system import (
    OWNER,
    account,
    add_model,
    deploy_models,
    model_config,
    model_spec,
    now,
    profile,
    refuses,
)

STRANGER = account("stranger").address


def register(models: Any, spec: ModelSpec, config: ModelConfig, sender: str = OWNER.address) -> Any:
    return models.register_model(spec.values(), config.values(), "ipfs://model", sender=sender)


def test_registration_and_views(models: Any) -> None:
    spec, config = model_spec(), model_config()
    assert register(models, spec, config) == spec.model_id()
    (event,) = models.get_logs()
    assert (event.model_id, event.metadata_uri) == (spec.model_id(), "ipfs://model")
    other = add_model(models, "other")
    assert models.model_count() == 2
    assert [models.model_at(i) for i in range(2)] == [spec.model_id(), other]
    assert ModelSpec(*models.model_spec(spec.model_id())) == spec
    assert ModelConfig(*models.model_config(spec.model_id())) == config
    with boa.reverts("models: no such index"):
        models.model_at(2)


def test_registration_is_the_owners_and_once(models: Any) -> None:
    spec, config = model_spec(), model_config()
    with boa.reverts("ownable: caller is not the owner"):
        register(models, spec, config, STRANGER)
    register(models, spec, config)
    with boa.reverts("models: already registered"):
        register(models, spec, config)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"vocab_size": 0}, "models: empty dimension"),
        ({"head_dim": 0}, "models: empty dimension"),
        ({"max_positions": 0}, "models: empty dimension"),
        ({"num_kv_heads": 0}, "models: heads do not group"),
        ({"num_kv_heads": 3}, "models: heads do not group"),
    ],
)
def test_config_must_make_sense(models: Any, change: dict[str, Any], reason: str) -> None:
    config = replace(model_config(), **change)
    with boa.reverts(reason):
        register(models, model_spec(config=config), config)


@pytest.mark.parametrize("name", list(ModelConfig.ABI))
def test_every_field_of_the_config_is_in_its_hash(models: Any, name: str) -> None:
    value = getattr(model_config(), name)
    if isinstance(value, bytes):
        changed: Any = b"\1" * 32
    else:
        changed = (not value) if isinstance(value, bool) else value + 1
    with boa.reverts("models: config does not match its hash"):
        register(models, model_spec(), replace(model_config(), **{name: changed}))


def test_model_needs_weights(models: Any) -> None:
    with boa.reverts("models: no weights"):
        register(models, replace(model_spec(), weights_root=bytes(32)), model_config())


def test_profiles_are_numbered_and_immutable(models: Any) -> None:
    model_id = add_model(models, profiles=0)
    first, second = profile(), replace(profile(), max_context=1024, end_token_ids=(3,), margin_table=())
    with boa.reverts("ownable: caller is not the owner"):
        models.add_profile(model_id, first.values(), sender=STRANGER)
    for number, entry in enumerate((first, second), start=1):
        assert models.add_profile(model_id, entry.values(), sender=OWNER.address) == number
        (event,) = models.get_logs()
        assert (event.version, event.profile_hash) == (number, entry.profile_hash())
    assert models.profile_count(model_id) == 2
    assert Profile.from_values(models.profile(model_id, 1)) == first
    assert Profile.from_values(models.profile(model_id, 2)) == second
    for number in (0, 3):
        with boa.reverts("models: unknown profile"):
            models.profile(model_id, number)


def changed_profile(**changes: Any) -> tuple[Any, ...]:
    """The values of a profile that Python would not let us build."""
    names = list(Profile.__dataclass_fields__)
    values = list(profile().values())
    for name, value in changes.items():
        values[names.index(name)] = value
    return tuple(values)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"vocab_size": 0, "end_token_ids": []}, "models: vocab_size out of range"),
        ({"vocab_size": 1001}, "models: vocab_size out of range"),
        ({"max_context": 0}, "models: max_context out of range"),
        ({"max_context": 2049}, "models: max_context out of range"),
        ({"dtype": bytes(32)}, "models: no dtype"),
        ({"kv_dtype": bytes(32)}, "models: no dtype"),
        ({"min_temperature_milli": 2001}, "models: temperatures out of order"),
        ({"end_token_ids": []}, "models: no end token"),
        ({"end_token_ids": [2, 1000]}, "models: end token out of range"),
        ({"margin_table": [(32, 1), (32, 2)]}, "models: table out of order"),
        ({"fingerprint_table": [(32, 1), (64, 2), (63, 3)]}, "models: table out of order"),
    ],
)
def test_profiles_are_checked(models: Any, changes: dict[str, Any], reason: str) -> None:
    model_id = add_model(models, profiles=0)
    with boa.reverts(reason):
        models.add_profile(model_id, changed_profile(**changes), sender=OWNER.address)
    assert models.profile_count(model_id) == 0


def test_full_tables_fit(models: Any) -> None:
    model_id = add_model(models, profiles=0)
    table = tuple(ThresholdRow(i + 1, 2**64 - 1) for i in range(8))
    full = replace(profile(), end_token_ids=tuple(range(8)), margin_table=table, fingerprint_table=table)
    models.add_profile(model_id, full.values(), sender=OWNER.address)
    assert Profile.from_values(models.profile(model_id, 1)) == full


def test_sunset_ends_service_but_deletes_nothing(models: Any) -> None:
    model_id = add_model(models)
    assert models.is_servable(model_id, 1)
    assert not models.is_servable(model_id, 0)
    assert not models.is_servable(model_id, 2)
    assert not models.is_servable(b"\1" * 32, 1)
    sunset = now() + 100
    for sender, time, reason in (
        (STRANGER, sunset, "ownable: caller is not the owner"),
        (OWNER.address, now() - 1, "models: sunset in the past"),
    ):
        with boa.reverts(reason):
            models.deprecate(model_id, time, sender=sender)
    models.deprecate(model_id, sunset, sender=OWNER.address)
    assert models.deprecated_at(model_id) == sunset
    boa.env.time_travel(seconds=99)
    assert models.is_servable(model_id, 1)
    boa.env.time_travel(seconds=1)
    assert not models.is_servable(model_id, 1)
    assert [models.served_within(model_id, 1, grace) for grace in (0, 1, 2**256 - 1)] == [False, True, True]
    boa.env.time_travel(seconds=7)
    assert [models.served_within(model_id, 1, grace) for grace in (7, 8)] == [False, True]
    assert not models.served_within(model_id, 2, 8) and not models.served_within(b"\1" * 32, 1, 8)
    assert Profile.from_values(models.profile(model_id, 1)) == profile()
    models.deprecate(model_id, now() + 50, sender=OWNER.address)
    (event,) = models.get_logs()
    assert (event.old_sunset, event.new_sunset) == (sunset, now() + 50)
    assert models.is_servable(model_id, 1)
    assert models.profile_count(model_id) == 1


def test_unknown_models(models: Any) -> None:
    unknown = b"\1" * 32
    refuses(
        "models: unknown model",
        lambda: models.model_spec(unknown),
        lambda: models.model_config(unknown),
        lambda: models.profile(unknown, 1),
        lambda: models.add_profile(unknown, profile().values(), sender=OWNER.address),
        lambda: models.deprecate(unknown, now(), sender=OWNER.address),
    )
    assert (models.profile_count(unknown), models.deprecated_at(unknown)) == (0, 0)


tables = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 2**64 - 1)), max_size=8).map(
    lambda rows: tuple(ThresholdRow(*row) for row in sorted(dict(rows).items()))
)


@pytest.mark.slow
@settings(max_examples=25)
@given(tables, tables, st.lists(st.integers(0, 70), min_size=4, max_size=4))
def test_limits_are_those_of_the_profile(
    margins: tuple[ThresholdRow, ...], fingerprints: tuple[ThresholdRow, ...], lengths: list[int]
) -> None:
    """At every length the row of the spec, and all else as it was registered."""
    with boa.env.anchor():
        models = deploy_models()
        model_id = add_model(models)
        added = replace(profile(), margin_table=margins, fingerprint_table=fingerprints)
        version = models.add_profile(model_id, added.values(), sender=OWNER.address)
        for tokens in (0, *lengths, 2**32 - 1):
            found = models.limits(model_id, version, tokens)
            for (length, limit), table in ((found[3], margins), (found[6], fingerprints)):
                scaled = -(-limit * tokens // length) if length else None
                assert scaled == threshold(table, tokens)
            zones = added.vocab_size, added.margin_dead_zone, added.margin_hard_limit
            assert (*found[:3], *found[4:6]) == (*zones, added.fingerprint_dead_zone, added.fingerprint_tolerance)
            assert found[7] == models.model_spec(model_id)[0]


def test_limits_and_config_hash_of_the_unknown(models: Any) -> None:
    with boa.reverts("models: unknown model"):
        models.config_hash(bytes(32))
    with boa.reverts("models: unknown model"):
        models.limits(bytes(32), 1, 5)
    model_id = add_model(models)
    assert models.config_hash(model_id) == models.model_spec(model_id)[3]
    for version in (0, models.profile_count(model_id) + 1):
        with boa.reverts("models: unknown profile"):
            models.limits(model_id, version, 5)
