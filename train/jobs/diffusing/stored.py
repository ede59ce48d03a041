"""Run folders from which another run continues: their models, their judge, the erased concept."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from jaxlib_unlearn.errors import UserError
from train.jobs.diffusing import judges, painters
from train.jobs.diffusing.config import ConceptRun, DefendRun, DiffuseRun, EraseRun
from train.jobs.diffusing.drawing import Shield
from train.jobs.diffusing.held import Painter
from train.jobs.diffusing.judges import Judge
from train.jobs.diffusing.judging import Shown
from train.options import config_files
from train.reporting import tables
from train.tasks.pictures import NOUNS

KINDS: dict[str, type[ConceptRun]] = {
    "train.diffuse": DiffuseRun,
    "train.erase": EraseRun,
    "train.defend": DefendRun,
}
PROJECTION = "projection.safetensors"


class Source(NamedTuple):
    """A finished run.

    Args:
        folder: the run folder.
        program: the program that made it.
        config: its configuration.
        concept: the erased class, by its first name; None: nothing was erased.
    """

    folder: Path
    program: str
    config: Any
    concept: str | None

    @property
    def name(self) -> str:
        """The name of its model in tables."""
        return {"train.diffuse": "original", "train.erase": "erased"}.get(self.program, "defended")


def read_run(folder: Path | None, option: str, programs: tuple[str, ...] = tuple(KINDS)) -> Source:
    """A finished run of one of some programs.

    Args:
        folder: the run folder.
        option: the option that named it, for messages.
        programs: the programs that may have made it.

    Raises:
        UserError: there is none, or it has not ended, is damaged, or is another program's.
    """
    names = " or ".join(programs)
    if folder is None:
        raise UserError(f"{option} is missing; give the folder of a run of {names}")
    folder = folder.expanduser()
    if not folder.is_dir():
        raise UserError(f"{option} {folder} is no folder; give that of a run of {names}")
    if not all((folder / name).is_file() for name in ("config.json", "summary.json", "run.json")):
        raise UserError(
            f"{option} {folder} is not a finished run; give the folder of one of {names} that ended"
        )
    program = tables.load_run(folder).about.get("program")
    if program not in programs:
        raise UserError(
            f"{option} {folder} is a run of {program or 'another program'}; give one of {names}"
        )
    config: Any = config_files.read_config(KINDS[program], folder / "config.json")
    concept = None
    if isinstance(config, EraseRun):
        concept = config.erase.concept
    if isinstance(config, DefendRun):
        concept = read_run(config.run, f"{folder}'s run").concept
    if not (folder / "export").is_dir():
        raise UserError(f"{option} {folder} has lost its export; run its command again")
    return Source(folder, program, config, concept)


def painter_of(source: Source, mesh: Any) -> Painter:
    """The model of a run."""
    return painters.given(source.folder / "export", source.config, mesh)


def original_of(source: Source, mesh: Any) -> Painter:
    """The model before anything was erased.

    Raises:
        UserError: the run has none.
    """
    if source.program == "train.diffuse":
        return painter_of(source, mesh)
    if source.program == "train.defend":
        return original_of(read_run(source.config.run, f"{source.folder}'s run"), mesh)
    here = source.folder / "original"
    if here.is_dir():
        return painters.given(here, source.config, mesh)
    path = Path(source.config.model.path).expanduser()
    if source.config.model.path == "scratch" or not path.is_dir():
        raise UserError(
            f"{source.folder} has no original, neither in original/ nor at --model.path {path}; "
            "run its command again"
        )
    return painters.given(path, source.config, mesh)


def judge_of(source: Source, mesh: Any) -> Judge:
    """The classifier that judged a run.

    Raises:
        UserError: it is damaged or gone.
    """
    config = source.config
    if config.judge.path != "scratch":
        names = tuple(noun.names[0] for noun in NOUNS[config.data.source])
        return judges.given(config.judge.path, names, mesh)
    folder = source.folder / "judge"
    if not folder.is_dir():
        raise UserError(f"{source.folder} has lost its judge; run its command again")
    return judges.load(folder, mesh)


def shown_of(source: Source, mesh: Any) -> Shown:
    """The model of a run with its defence, if any."""
    painter = painter_of(source, mesh)
    if source.program != "train.defend" or source.config.defend.where != "lookup":
        return Shown(painter)
    basis = judges.read_tensors(source.folder / "export" / PROJECTION)["basis"]
    spare = special_of(painter) if source.config.defend.skip_special else ()
    return Shown(painter, shield=Shield(basis, spare))


def special_of(painter: Painter) -> tuple[int, ...]:
    """The ids of the first, the end and the padding token."""
    t = painter.tokenizer
    return tuple(sorted({i for i in (t.bos_id, t.eos_id, t.pad_id) if i is not None}))
