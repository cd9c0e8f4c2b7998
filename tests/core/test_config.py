"""The environment is read once, and what it says wrongly is said back with the variable's name."""

import dataclasses
import logging
import warnings
from pathlib import Path

import pytest

from hvdkit.config import KIB, MIB, NOT_CONFIGURATION, Config
from hvdkit.errors import ConfigError


@pytest.fixture(autouse=True)
def no_unexpected_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def read(**environ):
    return Config.from_environment(environ)


def test_an_empty_environment_gives_the_defaults():
    assert read() == Config()
    assert read(PATH="/bin", HOROVOD_CYCLE_TIME="1") == Config()


def test_an_empty_value_counts_as_unset():
    assert read(HVDKIT_SHM="", HVDKIT_SEGMENT="") == Config()


@pytest.mark.parametrize("text", ["1", "true", "YES", " on "])
def test_a_flag_that_is_set(text):
    assert read(HVDKIT_ALLOW_SINGLETON=text).allow_singleton is True


@pytest.mark.parametrize("text", ["0", "False", "no", "OFF"])
def test_a_flag_that_is_not(text):
    assert read(HVDKIT_SHM=text).shm is False
    assert read(HVDKIT_NATIVE=text).native is False


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("1", 1),
        ("65536", 65536),
        ("64k", 64 * KIB),
        ("64KiB", 64 * KIB),
        ("64 kb", 64 * KIB),
        ("25MiB", 25 * MIB),
        ("3m", 3 * MIB),
        ("2G", 2048 * MIB),
        (" 7B ", 7),
    ],
)
def test_sizes_take_units(text, nbytes):
    assert read(HVDKIT_SEGMENT=text).segment_bytes == nbytes
    assert read(HVDKIT_SHM_SLOT=text).slot_bytes == nbytes


def test_a_fusion_threshold_of_0_turns_fusion_off_as_in_horovod():
    assert read(HOROVOD_FUSION_THRESHOLD="0").bucket_bytes == 0


@pytest.mark.parametrize("text", ["0", "-1", "1.5MiB", "64 parsecs", "MiB", "1 2", "0x10"])
def test_a_size_that_does_not_parse_names_its_variable(text):
    with pytest.raises(ConfigError, match=r"^HVDKIT_SEGMENT=.*: expected .* byte") as error:
        read(HVDKIT_SEGMENT=text)
    assert repr(text) in str(error.value)
    assert isinstance(error.value.__cause__, ValueError)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("HVDKIT_SHM", "maybe"),
        ("HVDKIT_NATIVE", "2"),
        ("HVDKIT_ALLOW_SINGLETON", "yess"),
        ("HVDKIT_SPIN", "-3"),
        ("HVDKIT_SPIN", "many"),
        ("HOROVOD_FUSION_THRESHOLD", "lots"),
    ],
)
def test_any_other_bad_value_names_its_variable(name, text):
    with pytest.raises(ConfigError, match=f"^{name}='{text}': expected"):
        read(**{name: text})


def test_a_count_may_be_zero():
    assert read(HVDKIT_SPIN="0").spin == 0


def test_horovods_name_is_read_and_hvdkits_wins():
    assert read(HOROVOD_FUSION_THRESHOLD="1048576").bucket_bytes == MIB
    assert read(HVDKIT_FUSION_THRESHOLD="2MiB").bucket_bytes == 2 * MIB
    both = read(HVDKIT_FUSION_THRESHOLD="2MiB", HOROVOD_FUSION_THRESHOLD="1048576")
    assert both.bucket_bytes == 2 * MIB
    unset = read(HVDKIT_FUSION_THRESHOLD="", HOROVOD_FUSION_THRESHOLD="1048576")
    assert unset.bucket_bytes == MIB


def test_a_directory_is_a_path():
    assert read(HVDKIT_SHM_DIR="/mnt/shared").shm_dir == Path("/mnt/shared")


def test_an_unknown_name_is_a_warning_with_the_nearest_known_one():
    with pytest.warns(UserWarning, match="HVDKIT_SEGMNET; did you mean HVDKIT_SEGMENT?"):
        assert read(HVDKIT_SEGMNET="4") == Config()


def test_an_unknown_name_that_resembles_nothing_is_a_warning_all_the_same():
    with pytest.warns(
        UserWarning, match="unknown environment variable HVDKIT_Q0123456789JXWVYZ0123456789$"
    ):
        read(HVDKIT_Q0123456789JXWVYZ0123456789="4")


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        read().spin = 3


@pytest.mark.parametrize("prefix", ["HVDKIT_", "HOROVOD_"])
def test_what_watches_over_stalls(prefix):
    assert read().stall_check == 60
    assert read().stall_shutdown == 0
    assert read(**{f"{prefix}STALL_CHECK_TIME_SECONDS": "2.5"}).stall_check == 2.5
    assert read(**{f"{prefix}STALL_SHUTDOWN_TIME_SECONDS": "30"}).stall_shutdown == 30
    assert read(**{f"{prefix}STALL_CHECK_DISABLE": "1"}).stall_check_disable
    for text in ("soon", "-1", "inf", "nan"):
        with pytest.raises(ConfigError, match="number of seconds, 0 or more"):
            read(**{f"{prefix}STALL_CHECK_TIME_SECONDS": text})


@pytest.mark.parametrize("prefix", ["HVDKIT_", "HOROVOD_"])
def test_timeline_and_log_level(prefix):
    assert read().timeline is None
    assert read(**{f"{prefix}TIMELINE": "/tmp/x.json"}).timeline == Path("/tmp/x.json")
    assert read(**{f"{prefix}TIMELINE": "DYNAMIC"}).timeline is None
    assert read().log_level == logging.WARNING
    assert read(**{f"{prefix}LOG_LEVEL": "Error"}).log_level == logging.ERROR
    with pytest.raises(ConfigError, match="LOG_LEVEL='loud': expected one of trace, debug"):
        read(**{f"{prefix}LOG_LEVEL": "loud"})


def test_whether_mpi_is_given_the_memory_of_gpus():
    assert read().cuda_aware is None
    assert read(HVDKIT_CUDA_AWARE="1").cuda_aware is True
    assert read(HVDKIT_CUDA_AWARE="0").cuda_aware is False


def test_how_the_ranks_join():
    assert read().transport == "auto"
    assert read(HVDKIT_TRANSPORT=" TCP ").transport == "tcp"
    with pytest.raises(ConfigError, match="HVDKIT_TRANSPORT='udp': expected auto, mpi or tcp"):
        read(HVDKIT_TRANSPORT="udp")


@pytest.mark.parametrize("name", ["HVDKIT_TCP_INTERFACES", "HOROVOD_GLOO_IFACE"])
def test_network_interfaces(name):
    assert read().tcp_interfaces == ()
    assert read(**{name: "eth1, ib0,"}).tcp_interfaces == ("eth1", "ib0")


@pytest.mark.parametrize(
    "name", ["HVDKIT_START_TIMEOUT", "HOROVOD_START_TIMEOUT", "HOROVOD_GLOO_TIMEOUT_SECONDS"]
)
def test_how_long_ranks_wait_for_each_other_to_start(name):
    assert read().start_timeout == 120
    assert read(**{name: "7.5"}).start_timeout == 7.5
    with pytest.raises(ConfigError, match=f"{name}='0': expected a number of seconds, more than 0"):
        read(**{name: "0"})


def test_how_long_a_peer_may_be_silent():
    assert read().peer_timeout == 30
    assert read(HVDKIT_PEER_TIMEOUT="5").peer_timeout == 5
    with pytest.raises(ConfigError, match="HVDKIT_PEER_TIMEOUT='0'"):
        read(HVDKIT_PEER_TIMEOUT="0")


def test_what_launchers_tell_a_rank_is_no_configuration():
    assert read(**dict.fromkeys(NOT_CONFIGURATION, "1")) == Config()
