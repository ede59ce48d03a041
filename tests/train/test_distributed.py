"""What can be tested with one process: options, comparisons, SIGTERM during deferred work."""

import os
import signal

import jax
import numpy as np
import pytest

from jaxlib_unlearn.errors import UserError
from train.runtime import distributed, sharding
from train.runtime.distributed import DistributedConfig, Preempted


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (DistributedConfig(auto=True, processes=2), "stands alone"),
        (DistributedConfig(coordinator="host:1"), "together"),
        (DistributedConfig(processes=2, process=0), "together"),
        (DistributedConfig(False, "host", 2, 0), "host is no host:port"),
        (DistributedConfig(False, ":80", 2, 0), "no host:port"),
        (DistributedConfig(False, "host:80", 2, 2), "count from 0"),
        (DistributedConfig(False, "host:80", 0, 0), "count from 0"),
        (DistributedConfig(False, "host:80", 2, -1), "count from 0"),
        (DistributedConfig(False, "host:80", 2, 1, timeout=0), "--distributed.timeout is 0"),
        (DistributedConfig(auto=True, heartbeat=0), "--distributed.heartbeat is 0"),
    ],
)
def test_options_that_do_not_go_together(config, words):
    with pytest.raises(UserError, match=words) as error:
        distributed.start(config)
    assert "\n" not in str(error.value)


def test_the_command_line_says_it_in_one_line(program, tmp_path):
    argv = ["quickstart", "--output", tmp_path / "run", "--distributed.processes", "2"]
    done = program("train.unlearn", *argv)
    assert done.code == 2 and len(done.err.splitlines()) == 1 and "together" in done.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("heartbeat", [300, 40])
def test_a_long_compilation_may_be_silent(monkeypatch, heartbeat):
    given = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **options: given.update(options))
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    options = {} if heartbeat == 300 else {"heartbeat": heartbeat}
    distributed.start(DistributedConfig(False, "host:80", 1, 0, timeout=7, **options))
    assert given == {"initialization_timeout": 7, "heartbeat_timeout_seconds": heartbeat}


def test_alone_nothing_is_asked_of_others():
    distributed.start(DistributedConfig())
    assert distributed.is_first() and not distributed.many()
    assert distributed.gather({"a": 1}) == [{"a": 1}]
    unsent = object()  # not a JSON value: it is not sent
    assert distributed.of_first(lambda: unsent) is unsent
    distributed.check_same({"a": 1})
    distributed.stop_point()
    with pytest.raises(ZeroDivisionError), distributed.together():
        raise ZeroDivisionError


@pytest.fixture
def three(monkeypatch):
    """As process 0 of three; `three.told` is what the others answer."""

    class Others:
        told: list = []

    def gather(value):
        return [value, *Others.told]

    monkeypatch.setattr(distributed._state, "many", True)
    monkeypatch.setattr(distributed, "gather", gather)
    return Others


def test_what_differs_is_named(three):
    mine = {"configuration": {"a": {"b": 1}}, "code": distributed.code_digest()}
    mine["jax"] = jax.__version__
    three.told = [mine, mine]
    distributed.check_same({"a": {"b": 1}})
    three.told = [mine, mine | {"code": "other"}]
    with pytest.raises(distributed.Agreed, match="processes 0 and 2: the code differs"):
        distributed.check_same({"a": {"b": 1}})
    three.told = [mine | {"jax": "0.1"}, mine]
    with pytest.raises(distributed.Agreed, match="processes 0 and 1: the version of jax differs"):
        distributed.check_same({"a": {"b": 1}})
    three.told = [mine, mine | {"configuration": {"a": {"b": 2}}}]
    with pytest.raises(distributed.Agreed, match=r"a\.b: 1 on process 0, 2 on process 2"):
        distributed.check_same({"a": {"b": 1}})


def test_errors_are_everybodys(three):
    three.told = [None, "no such file"]
    with pytest.raises(distributed.Agreed, match="^process 2: no such file$"):
        with distributed.together():
            pass
    three.told = [None, None]
    with pytest.raises(distributed.Agreed, match="^mine$"), distributed.together():
        raise UserError("mine")
    with pytest.raises(distributed.Agreed, match="^OSError: full$"), distributed.together():
        raise OSError("full")
    with pytest.raises(ZeroDivisionError), distributed.together():  # a bug keeps its traceback
        raise ZeroDivisionError
    with pytest.raises(distributed.Agreed, match="^mine$"):
        distributed.of_first(lambda: (_ for _ in ()).throw(UserError("mine")))


def test_the_code_digest_sees_the_code(monkeypatch, tmp_path):
    known = distributed.code_digest()
    assert known == distributed.code_digest() and len(known) == 64
    for package in distributed.PACKAGES:
        (tmp_path / package).mkdir()
        (tmp_path / package / "one.py").write_text("x = 1\n")
    here = tmp_path / "train" / "runtime" / "distributed.py"
    monkeypatch.setattr(distributed, "__file__", str(here))
    found = {distributed.code_digest()}
    (tmp_path / "models" / "one.py").write_text("x = 2\n")
    found.add(distributed.code_digest())
    (tmp_path / "models" / "one.py").rename(tmp_path / "models" / "two.py")
    found.add(distributed.code_digest())
    assert len(found) == 3 and known not in found


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_waits_for_deferred_work():
    done = []
    with pytest.raises(Preempted), distributed.signals_stop():
        with distributed.deferred():
            terminate()
            assert distributed.asked_to_stop()
            with distributed.deferred():
                done.append("inner")
            done.append("outer")
        done.append("never")
    assert done == ["inner", "outer"]
    with distributed.signals_stop():  # the signal belonged to another run
        assert not distributed.asked_to_stop()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_sigterm_leaves_what_may_be_left():
    done = []
    with pytest.raises(Preempted), distributed.signals_stop():
        terminate()
        done.append("never")
    with pytest.raises(Preempted), distributed.signals_stop():
        with distributed.deferred(), distributed.interruptible():
            terminate()
            done.append("never")
    with pytest.raises(Preempted), distributed.signals_stop(), distributed.deferred():
        terminate()
        with distributed.interruptible():
            done.append("never")
    assert not done
    # No handler for failures catches it.
    with pytest.raises(Preempted), distributed.signals_stop():
        try:
            terminate()
        except Exception:
            done.append("never")
    assert not done


def test_rows_of_a_process_are_those_of_its_devices():
    mesh = sharding.make_mesh(sharding.MeshConfig(2, 2, 2))
    batch = {"row_id": np.arange(8), "tokens": np.arange(24).reshape(8, 3)}
    assert sharding.rows_here(mesh, 8).tolist() == list(range(8))
    for placed in (sharding.put_batch(batch, mesh), sharding.put_batch(batch, mesh, 8)):
        for name, x in placed.items():
            assert np.array_equal(x, batch[name])
            assert x.sharding == sharding.batch_sharding(mesh)
