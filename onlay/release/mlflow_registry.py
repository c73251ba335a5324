"""Versions in an MLflow model registry: the files as a run's artifacts, the version's digest as a tag.

MLflow is an extra (mlflow-skinny is enough for a server).  Where it is, MLflow's own MLFLOW_TRACKING_URI and
MLFLOW_REGISTRY_URI say.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from onlay.errors import OutputError, SetupError
from onlay.records import AdapterVersion

EXPERIMENT, FOLDER = "onlay", "version"


def send(version: AdapterVersion, folder: Path, name: str) -> str:
    """Makes a model version of `folder`; its number.  Raises SetupError without MLflow, OutputError when it refuses."""
    mlflow = _mlflow()
    client, refused = mlflow.MlflowClient(), mlflow.exceptions.MlflowException
    try:
        experiment = client.get_experiment_by_name(EXPERIMENT)
        number = experiment.experiment_id if experiment is not None else client.create_experiment(EXPERIMENT)
        run = client.create_run(number, run_name=version.id)
        client.log_artifacts(run.info.run_id, str(folder), FOLDER)
        client.set_terminated(run.info.run_id)
        if not client.search_registered_models(filter_string=f"name = '{name}'"):
            client.create_registered_model(name)
        made = client.create_model_version(
            name, source=f"{run.info.artifact_uri}/{FOLDER}", run_id=run.info.run_id,
            tags={"onlay.id": version.id, "onlay.digest": version.digest, "onlay.base": version.base},
        )  # fmt: skip
    except refused as error:
        raise _refused(name, error) from None
    return str(made.version)


def fetch(name: str, selector: str | None, folder: Path) -> tuple[str, Path]:
    """Downloads a model version (a number, an alias, or the newest) under `folder`; its number and where the files are."""
    mlflow = _mlflow()
    client, refused = mlflow.MlflowClient(), mlflow.exceptions.MlflowException
    try:
        if selector is None:
            found = max(
                client.search_model_versions(f"name = '{name}'"), key=lambda one: int(one.version), default=None
            )
        elif selector.isdigit():
            found = client.get_model_version(name, selector)
        else:
            found = client.get_model_version_by_alias(name, selector)
        if found is None:
            raise OutputError(f"mlflow://{name} has no version.", "Push one: onlay push VERSION mlflow://NAME")
        uri = client.get_model_version_download_uri(name, found.version)
        path = mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(folder))
    except refused as error:
        raise _refused(name, error) from None
    return str(found.version), Path(path)


def _mlflow() -> Any:
    if importlib.util.find_spec("mlflow") is None:
        raise SetupError("mlflow:// needs MLflow, which is not installed.", "pip install 'onlay[mlflow]'")
    for part in ("mlflow.artifacts", "mlflow.exceptions"):
        importlib.import_module(part)
    return importlib.import_module("mlflow")


def _refused(name: str, error: Exception) -> OutputError:
    return OutputError(
        f"mlflow://{name}: MLflow refused: {str(error).splitlines()[0]}.",
        "Check MLFLOW_TRACKING_URI, the name and the version.",
    )
