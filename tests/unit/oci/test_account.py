from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_isolation.errors import SpecRefused
from airflow_isolation.oci.account import Account, needs_account_files, resolve_account

PASSWD = """\
root:x:0:0:root:/root:/bin/bash
# a comment
+::::::
airflow:x:50000:0:Airflow:/home/airflow:/bin/bash
toor:x:0:0:another root:/root:/bin/sh
sales:x:1000:1000:\u2028Sales:/srv/sales:
nohome:x:1001:1001:::/bin/sh
huge:x:2147483648:1:::/bin/sh
"""
GROUP = """\
root:x:0:
data:x:70:airflow,sales
audio:x:29:sales
sales:x:1000:
broken
huge:x:4294967296:
"""


def resolve(user: str, *, allow_root: bool = False) -> Account:
    return resolve_account(user, passwd=PASSWD, group=GROUP, allow_root=allow_root, image="team/image:1")


def test_a_name_has_its_groups_and_home() -> None:
    assert resolve("airflow") == Account(
        uid=50000, gid=0, additional_gids=(0, 70), name="airflow", home="/home/airflow"
    )


def test_a_known_uid_is_the_same_account_as_its_name() -> None:
    assert resolve("50000") == resolve("airflow")
    assert resolve("0050000") == resolve("airflow")


def test_an_unknown_uid_has_group_0_and_no_home() -> None:
    assert resolve("4711") == Account(uid=4711, gid=0, additional_gids=(0,))


def test_uid_and_gid() -> None:
    assert resolve("4711:42") == Account(uid=4711, gid=42, additional_gids=(42,))


def test_name_and_group_name() -> None:
    assert resolve("airflow:audio").gid == 29


def test_memberships_stay_with_another_primary_group() -> None:
    assert resolve("sales:5").additional_gids == (5, 29, 70)


def test_the_primary_group_is_always_among_the_additional_ones() -> None:
    assert resolve("nohome") == Account(uid=1001, gid=1001, additional_gids=(1001,), name="nohome")


@pytest.mark.parametrize("user", ["4711", "4711:42"])
def test_numeric_ids_work_without_the_image_s_files(user: str) -> None:
    assert resolve_account(user, passwd=None, group=None).uid == 4711


@pytest.mark.parametrize(
    ("user", "file"), [("airflow", "/etc/passwd"), ("4711:data", "/etc/group"), ("airflow:70", "/etc/passwd")]
)
def test_names_need_the_image_s_files(user: str, file: str) -> None:
    with pytest.raises(SpecRefused, match=f"no readable {file}.*uid:gid"):
        resolve_account(user, passwd=None, group=None, image="team/image:1")


@pytest.mark.parametrize("user", ["nobody2", "Airflow", "air flow", "-1", "+5", "1e3", "٣", "root "])
def test_a_name_that_is_not_in_the_image_is_named_with_the_image(user: str) -> None:
    with pytest.raises(SpecRefused) as refused:
        resolve(user)
    assert repr(user) in str(refused.value)
    assert "team/image:1" in str(refused.value)
    assert "run_as_user" in refused.value.hint


def test_a_group_that_is_not_in_the_image() -> None:
    with pytest.raises(SpecRefused, match=r"team/image:1 has no group 'wheel' in its /etc/group"):
        resolve("airflow:wheel")


@pytest.mark.parametrize("user", ["root", "0", "0:0", "toor", "0:70", "000", "root:data"])
def test_root_is_refused_by_every_name(user: str) -> None:
    with pytest.raises(SpecRefused, match="uid 0") as refused:
        resolve(user)
    assert "run_as_user" in refused.value.hint
    assert "allow_root" in refused.value.hint


def test_an_image_without_user_would_be_root() -> None:
    with pytest.raises(SpecRefused, match="team/image:1 names no user"):
        resolve("")


@pytest.mark.parametrize("user", ["", "root", "0"])
def test_root_may_be_allowed(user: str) -> None:
    assert resolve(user, allow_root=True) == Account(uid=0, gid=0, additional_gids=(0,), name="root", home="/root")


@pytest.mark.parametrize("user", ["2147483648", "4294967296", "1:2147483648", "9" * 30, "1:" + "9" * 5000, "huge"])
def test_an_id_that_int32_can_t_hold_is_refused(user: str) -> None:
    with pytest.raises(SpecRefused, match="not a number from 0 to 2147483647"):
        resolve(user)


def test_the_largest_id() -> None:
    assert resolve("2147483647:2147483647").gid == 2147483647


@pytest.mark.parametrize("user", [":", ":0", "airflow:", "1:2:3", "::"])
def test_other_forms_are_not_a_user(user: str) -> None:
    with pytest.raises(SpecRefused, match="is not a user"):
        resolve(user)


@given(
    st.integers(1, 2**31 - 1),
    st.integers(0, 2**31 - 1),
)
def test_numbers_in_range_are_taken_as_they_are(uid: int, gid: int) -> None:
    assert resolve_account(f"{uid}:{gid}", passwd="", group="") == Account(uid=uid, gid=gid, additional_gids=(gid,))


@given(st.text(max_size=20), st.text(max_size=60) | st.none(), st.text(max_size=60) | st.none())
def test_no_text_gives_root_or_an_id_out_of_range(user: str, passwd: str | None, group: str | None) -> None:
    try:
        account = resolve_account(user, passwd=passwd, group=group)
    except SpecRefused:
        return
    assert 0 < account.uid < 2**31
    assert 0 <= account.gid < 2**31
    assert account.gid in account.additional_gids


@pytest.mark.parametrize(
    ("user", "needed"),
    [
        ("", False),
        ("0", False),
        ("50000", False),
        ("50000:0", False),
        ("airflow", True),
        ("1:data", True),
        ("a:1", True),
    ],
)
def test_only_names_need_the_account_files(user: str, needed: bool) -> None:
    assert needs_account_files(user) is needed
