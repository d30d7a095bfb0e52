"""What stands below a table: how it was made, and what its runs ran on."""

from pathlib import Path

from auxilearn.errors import UserError
from auxilearn.run.record import CONFIG_FILE, SUMMARY_FILE, read_json


def notes(results, command, hyperparameters):
    """Lines for below a table: its command, its hyper-parameters, what its runs ran on.

    Args: ``results`` of the table; ``hyperparameters``: how they were chosen, sentences.
    """
    environments, fingerprints, seconds = {}, {}, 0.0
    directories = {r.directory for r in results if r.state == "done"}
    for directory in sorted(directories):
        try:
            recorded = read_json(Path(directory) / CONFIG_FILE)
            environment, data = recorded["environment"], recorded["data"]["fingerprint"]
            seconds += read_json(Path(directory) / SUMMARY_FILE)["seconds"]
            packages = environment["packages"]
            kind = (
                f"Python {environment['python']}, torch {packages['torch']}, torchvision "
                f"{packages['torchvision']}, {environment['machine']}, "
                f"{recorded['config']['device']}, threads {environment['threads']}, revision "
                f"{environment['git_revision']}"
            )
        except (KeyError, TypeError):
            raise UserError(f"{directory}: not what a run leaves; remove it") from None
        environments[kind] = environments.get(kind, 0) + 1
        fingerprints[data] = None
    lines = [f"Command: `{command}`.", *hyperparameters]
    lines += [f"{count} runs on {kind}." for kind, count in environments.items()]
    if directories:
        lines.append(
            f"Training took {seconds / 3600:.2f} h in all, each run by its own clock. Data: "
            f"fingerprint {', '.join(f[:12] for f in fingerprints)}."
        )
    return lines
