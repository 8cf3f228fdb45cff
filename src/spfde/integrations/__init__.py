"""SpFDE inside the trainers of others: one file each, imported when it is asked for.

``spfde.integrations.lightning.SpfdeCallback``, ``spfde.integrations.transformers.SpfdeCallback`` and
``spfde.integrations.accelerate.attach``. Importing this package imports none of the three.
"""
