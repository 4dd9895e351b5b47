"""What an export reads of the model itself, out of the package that reads checkpoints."""

from m2ray.activations.reading.catalogue import Catalogue
from m2ray.model.target_weights import TargetWeights, target_weights


def target_of(catalogue: Catalogue, folder: str) -> TargetWeights:
    """Embedding and head of the run's model. Raises as `target_weights`."""
    return target_weights(folder, catalogue.job.fingerprints["model"], catalogue.job.layers_run)
