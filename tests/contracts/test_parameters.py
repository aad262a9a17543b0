"""Parameters: bounds, relations, revisions, the packed terms of a batch; and the Python list is the same one."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import boa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poip_chain.economic.parameters import (
    DEVNET_PARAMETERS,
    MAX_VALUE,
    PARAMETERS,
    POIP,
    Parameter,
    parameter_key,
    with_values,
)
from poip_chain.errors import InvalidInput
from tests.contracts import system
from tests.contracts.system import OWNER, account, refuses, set_parameter, value_of

PATH = system.CONTRACTS / "governance/Parameters.vy"


def deploy(rows: list[Any]) -> Any:
    return system.load(PATH, rows)


def rows_with(**changes: Any) -> list[Any]:
    """The default rows with the row of `name` changed by keyword name=(value, minimum, maximum)."""
    rows = {p.name: p.as_tuple() for p in PARAMETERS}
    for name, numbers in changes.items():
        rows[name] = (rows[name][0], *numbers, rows[name][4])
    return list(rows.values())


def test_defaults_are_described(parameters: Any) -> None:
    assert list(parameters.names()) == [p.key for p in PARAMETERS]
    for p in PARAMETERS:
        assert tuple(parameters.describe(p.key)) == (p.value, p.minimum, p.maximum, p.unit)
        assert parameters.value(p.key) == parameters.value_at(p.key, 0) == p.value
    assert (parameters.revision(), parameters.version()) == (0, "0.1.0")


def test_names_module_agrees() -> None:
    text = (system.CONTRACTS / "governance/parameter_names.vy").read_text()
    constants = dict(re.findall(r"^([A-Z_]+): constant\(bytes32\) = 0x([0-9a-f]{64})$", text, re.MULTILINE))
    assert constants == {p.name.upper(): p.key.hex() for p in PARAMETERS}


def test_devnet_profile_deploys() -> None:
    contract = deploy([p.as_tuple() for p in DEVNET_PARAMETERS])
    assert 20 <= value_of(contract, "response_window") <= value_of(contract, "challenge_window") <= 40
    assert value_of(contract, "beacon_delay") == 2
    assert [p.name for p in DEVNET_PARAMETERS] == [p.name for p in PARAMETERS]


def test_only_the_owner_changes_values(parameters: Any) -> None:
    with boa.reverts("ownable: caller is not the owner"):
        parameters.set_value(parameter_key("audit_rate"), 50_000, sender=account("alice").address)
    parameters.transfer_ownership(account("alice").address, sender=OWNER.address)
    parameters.accept_ownership(sender=account("alice").address)
    parameters.set_value(parameter_key("audit_rate"), 50_000, sender=account("alice").address)
    with boa.reverts("ownable: caller is not the owner"):
        parameters.set_value(parameter_key("audit_rate"), 60_000, sender=OWNER.address)


@pytest.mark.parametrize("parameter", PARAMETERS, ids=lambda p: p.name)
def test_bounds(parameters: Any, parameter: Parameter) -> None:
    if parameter.minimum > 0:
        with boa.reverts("parameters: below minimum"):
            set_parameter(parameters, parameter.name, parameter.minimum - 1)
    for value in (parameter.maximum + 1, 2**256 - 1):
        with boa.reverts("parameters: above maximum"):
            set_parameter(parameters, parameter.name, value)
    assert parameters.revision() == 0


def test_change_is_logged_with_old_and_new(parameters: Any) -> None:
    set_parameter(parameters, "audit_rate", 50_000)
    (event,) = parameters.get_logs()
    assert (event.name, event.old_value, event.new_value, event.revision) == (
        parameter_key("audit_rate"), 100_000, 50_000, 1,
    )  # fmt: skip


def test_each_revision_stays_readable(parameters: Any) -> None:
    for name, value in (("audit_rate", 50_000), ("jail_period", 5), ("audit_rate", 60_000), ("audit_rate", 70_000)):
        set_parameter(parameters, name, value)
    rates = [parameters.value_at(parameter_key("audit_rate"), revision) for revision in range(5)]
    assert rates == [100_000, 50_000, 50_000, 60_000, 70_000]
    assert [parameters.value_at(parameter_key("jail_period"), revision) for revision in (0, 1, 2, 4)] == [
        86400, 86400, 5, 5,
    ]  # fmt: skip


def test_unknown_names_and_revisions(parameters: Any) -> None:
    unknown = parameter_key("audit_rat")
    refuses(
        "parameters: unknown name",
        lambda: parameters.value(unknown),
        lambda: parameters.value_at(unknown, 0),
        lambda: parameters.describe(unknown),
        lambda: parameters.set_value(unknown, 0, sender=OWNER.address),
    )
    with boa.reverts("parameters: unknown revision"):
        parameters.value_at(parameter_key("audit_rate"), 1)


def test_periods_cover_the_longest_case(parameters: Any) -> None:
    window, response = value_of(parameters, "challenge_window"), value_of(parameters, "response_window")
    accusation = value_of(parameters, "reveal_window") + value_of(parameters, "contest_window")
    accusation += 2 * value_of(parameters, "dispute_clock")
    longest = window + 2 * response + accusation
    for name in ("unbonding_period", "thaw_period"):
        set_parameter(parameters, name, longest)
    for name in ("unbonding_period", "thaw_period"):
        with boa.reverts(f"parameters: {name} too short"):
            set_parameter(parameters, name, longest - 1)
    parts = ("challenge_window", "response_window", "reveal_window", "contest_window", "dispute_clock")
    for name in parts:
        with boa.reverts("parameters: unbonding_period too short"):
            set_parameter(parameters, name, value_of(parameters, name) + 1)
    set_parameter(parameters, "unbonding_period", longest + 2)
    for name in parts:
        with boa.reverts("parameters: thaw_period too short"):
            set_parameter(parameters, name, value_of(parameters, name) + 1)


def test_constructor_refuses_bad_lists() -> None:
    good = rows_with()
    bad = {
        "parameters: duplicate name": [*good, good[0]],
        "parameters: empty name": [*good, (bytes(32), 0, 0, 0, "")],
        "parameters: below minimum": rows_with(audit_rate=(9, 10, 20)),
        "parameters: above maximum": rows_with(audit_rate=(21, 10, 20)),
        "parameters: maximum too large": rows_with(minimum_stake=(1, 1, MAX_VALUE + 1)),
        "parameters: rate above 100 percent": rows_with(reward_share=(10**6 + 1, 0, 10**7)),
        "parameters: terms out of range": rows_with(minimum_lock=(2**96, 0, 2**100)),
        "parameters: unbonding_period too short": rows_with(unbonding_period=(10, 10, 10)),
        "parameters: unknown name": [row for row in good if row[0] != parameter_key("thaw_period")],
    }
    for reason, rows in bad.items():
        with boa.reverts(reason):
            deploy(rows)


BATCH_TERMS = ("audit_rate", "detection_power", "reward_share", "challenge_window", "minimum_lock")


@settings(max_examples=15)
@given(data=st.data())
def test_history_and_terms(parameters: Any, data: st.DataObject) -> None:
    """After any changes, each revision still answers as it stood, and the packed terms are the present values."""
    contract = parameters
    present = {p.name: p.value for p in PARAMETERS}
    past = [dict(present)]
    changeable = [p for p in PARAMETERS if p.unit != "seconds"]
    for _ in range(data.draw(st.integers(1, 6))):
        parameter = data.draw(st.sampled_from(changeable[:4]))
        value = data.draw(st.integers(parameter.minimum, parameter.maximum))
        set_parameter(contract, parameter.name, value)
        present[parameter.name] = value
        past.append(dict(present))
        terms = contract.batch_terms()
        assert terms.revision == contract.revision() == len(past) - 1
        assert {name: getattr(terms, name) for name in BATCH_TERMS} == {n: present[n] for n in BATCH_TERMS}
    for revision, values in enumerate(past):
        for parameter in changeable[:4]:
            assert contract.value_at(parameter.key, revision) == values[parameter.name]


@pytest.mark.parametrize("name", BATCH_TERMS)
def test_terms_hold_the_extremes(name: str) -> None:
    (parameter,) = [p for p in PARAMETERS if p.name == name]
    for value in (parameter.minimum, parameter.maximum):
        periods = {"unbonding_period": 90 * 86400, "thaw_period": 90 * 86400}
        contract = system.deploy_parameters({**periods, name: value})
        terms = contract.batch_terms()
        expected = {p.name: p.value for p in PARAMETERS} | {name: value}
        assert {n: getattr(terms, n) for n in BATCH_TERMS} == {n: expected[n] for n in BATCH_TERMS}


def eased(contract: Any) -> tuple[int, int]:
    terms = contract.batch_terms()
    return terms.eased_lock, terms.eased_divisor


def test_a_harder_lock_waits_for_a_challenge_window(parameters: Any) -> None:
    """What was signed before the change can be committed with the stake that its node counted on."""
    contract, values = parameters, {p.name: p.value for p in PARAMETERS}
    window = values["challenge_window"]

    def divisor(audit: int, power: int, share: int) -> int:
        return audit * power * (10**6 - share)

    start = (POIP, divisor(100_000, 800_000, 300_000))
    assert eased(contract) == start
    set_parameter(contract, "minimum_lock", 5 * POIP)
    assert contract.batch_terms().minimum_lock == 5 * POIP
    boa.env.time_travel(seconds=window - 1)
    assert eased(contract) == start
    boa.env.time_travel(seconds=1)
    assert eased(contract) == (5 * POIP, start[1])
    # An easier lock counts at once, and is held against a harder one after it.
    set_parameter(contract, "minimum_lock", 2 * POIP)
    set_parameter(contract, "audit_rate", 200_000)
    easy = (2 * POIP, 2 * start[1])
    assert eased(contract) == easy
    set_parameter(contract, "minimum_lock", 3 * POIP)
    boa.env.time_travel(seconds=window // 2)
    set_parameter(contract, "detection_power", 400_000)
    assert eased(contract) == easy
    # What does not touch the lock, or eases it, prolongs nothing.
    boa.env.time_travel(seconds=window // 2)
    set_parameter(contract, "protocol_fee", 0)
    set_parameter(contract, "reward_share", 200_000)
    assert eased(contract) == easy
    boa.env.time_travel(seconds=window // 2)
    assert eased(contract) == (3 * POIP, divisor(200_000, 400_000, 200_000))


def test_python_list_refuses_what_the_contract_refuses() -> None:
    with pytest.raises(InvalidInput, match="audit_rate must be from 10000"):
        with_values(PARAMETERS, {"audit_rate": 1})
    with pytest.raises(InvalidInput, match="no parameter 'audit'"):
        with_values(PARAMETERS, {"audit": 1})
    with pytest.raises(InvalidInput, match="Raise unbonding_period first"):
        with_values(PARAMETERS, {"challenge_window": 30 * 86400})
    with pytest.raises(InvalidInput, match="bounds"):
        replace(PARAMETERS[0], minimum=2, maximum=1)
    with pytest.raises(InvalidInput, match="32 ASCII"):
        parameter_key("x" * 33)
