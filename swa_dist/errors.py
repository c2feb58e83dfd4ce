"""What can go wrong, by who can mend it. Each class carries the exit code of the command line."""

import enum


class ExitCode(enum.IntEnum):
    """The exit codes of `swa-dist`, after BSD's sysexits where they have one."""

    OK = 0
    UNFORESEEN = 1
    USAGE = 2
    GATE_REJECTED = 10
    BAD_DATA = 65
    DEPENDENCY_DOWN = 69
    NUMERICS = 70
    OUTPUT = 73
    STOPPED = 75
    BAD_CONFIG = 78


class SwaDistError(Exception):
    """A mistake or fault that is named to the person in one sentence and one remedy."""

    exit_code = ExitCode.UNFORESEEN


class ConfigError(SwaDistError):
    """The recipe asks for what can't be done."""

    exit_code = ExitCode.BAD_CONFIG


class DataError(SwaDistError):
    """The images, or the index of them, are not what they must be."""

    exit_code = ExitCode.BAD_DATA


class CheckpointError(SwaDistError):
    """A weights file or a checkpoint is damaged, foreign or unsafe."""

    exit_code = ExitCode.BAD_DATA


class NumericsError(SwaDistError):
    """A number that must be finite is not, or replicas that must be equal differ."""

    exit_code = ExitCode.NUMERICS


class OutOfMemoryError(SwaDistError):
    """A worker's images, weights and gradients don't fit into its memory."""

    exit_code = ExitCode.NUMERICS


class ServiceError(SwaDistError):
    """Something this program depends on (Ray, MLflow, a download, another worker) is down or refuses."""

    exit_code = ExitCode.DEPENDENCY_DOWN


class OutputError(SwaDistError):
    """The output folder can't be written."""

    exit_code = ExitCode.OUTPUT


class BusyError(SwaDistError):
    """Another process is at it; try again later."""

    exit_code = ExitCode.STOPPED


class Stopped(SwaDistError):  # noqa: N818 - nothing went wrong: the run was asked to stop and can be resumed
    """The run was asked to stop; its state is committed and the same command resumes it."""

    exit_code = ExitCode.STOPPED
