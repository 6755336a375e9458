"""RD-MLDG with a focal label term (Lin et al., 2017, arXiv 1708.02002, eq. 4): -(1 - p)^γ log p in place of -log p."""

from domainbed_reasoning import RDMLDG, Hparam
from domainbed_reasoning.hparam_checks import FROM_0


class FocalRDMLDG(RDMLDG):
    """Images whose class the model knows already weigh less in the label term; the chain term is RD-MLDG's."""

    HPARAMS = {
        **RDMLDG.HPARAMS,
        "focal_gamma": Hparam(2.0, lambda random: random.uniform(0, 5), "Lin et al.: 2", allowed=FROM_0),
    }

    def terms(self, images, names, chains):
        """Return both terms of each image, ``(n,)`` in nats."""
        label, chain = super().terms(images, names, chains)
        unsure = (1 - (-label).exp()).clamp_min(1e-6)  # at 0 the power has no finite gradient
        return unsure ** self.hparams["focal_gamma"] * label, chain
