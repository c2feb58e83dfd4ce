"""What the workers' fork server imports, so that they need not."""

import swa_dist.cli
import swa_dist.data.dali
import swa_dist.service.standalone
import swa_dist.training.finetune
import tests.small_run

__all__ = ["swa_dist", "tests"]
