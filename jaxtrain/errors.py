"""Typed errors. Each carries the process exit code that `main` ends with (sysexits.h where one fits)."""

REPORT_THIS = "This should not happen; please report it."


class JaxtrainError(Exception):
    """Base of every error that jaxtrain raises on purpose. Its text is one clear sentence for a person."""

    exit_code = 70
    retry = False
    """Whether the same command may succeed another time. Where it may not, the supervisor does not restart it."""


class ConfigError(JaxtrainError):
    """A setting, a flag or a recipe is wrong; raised before any device is touched where that is possible."""

    exit_code = 64


class DataError(JaxtrainError):
    """A data set is missing, incomplete or damaged."""

    exit_code = 65


class CheckpointError(JaxtrainError):
    """A checkpoint is missing, damaged, or belongs to another model."""

    exit_code = 66


class WeightsError(JaxtrainError):
    """A file of weights is missing, damaged, could run code, or belongs to another model."""

    exit_code = 66


class CompilerRefusalError(JaxtrainError):
    """XLA does not compile a program of the run for the devices that were asked for."""


class DeviceMemoryError(JaxtrainError):
    """The program does not fit the devices' memory; restarting it unchanged cannot help."""

    exit_code = 70


class DamagedError(CheckpointError):
    """A checkpoint's files are not those that its manifest names."""


class UnreadableError(CheckpointError):
    """A checkpoint's files cannot be read now, which says nothing about what is in them."""


class WorkdirError(JaxtrainError):
    """The work directory cannot be written, or belongs to a run with another config."""

    exit_code = 73


class TakenOverError(WorkdirError):
    """Another run has taken the work directory over, or it is gone: this one may write nothing more there."""


class CallbackError(JaxtrainError):
    """A callback of the user's own failed; the last checkpoint is as it was."""


class NumericError(JaxtrainError):
    """The loss or the gradient norm became NaN or infinite; the state before that update is kept."""

    exit_code = 76


class EnvironmentMismatchError(JaxtrainError):
    """The processes, devices or versions found are not those that the run was told to use."""

    exit_code = 78


class PeerError(JaxtrainError):
    """Another process of the run died, failed or does not answer; this one has no fault of its own."""

    exit_code = 70
    retry = True


class HangError(JaxtrainError):
    """This process made no progress for longer than `train.hang_seconds` allows."""

    exit_code = 70
    retry = True


class SweepError(JaxtrainError):
    """Some runs of a sweep failed; the others are done."""


class InterruptedRunError(JaxtrainError):
    """Ctrl-C: the run saved a checkpoint and stopped."""

    exit_code = 130


class PreemptedError(JaxtrainError):
    """SIGTERM: the run saved a checkpoint and stopped; start it again to go on."""

    exit_code = 75
