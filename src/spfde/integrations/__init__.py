"""Trainers that own the loop: one file each, imported when it is asked for.

None is here yet. A callback calls ``session.begin_epoch()``, ``observe()`` and ``end_epoch()`` (docs/faq.md).
"""
