"""What a recipe will do, in numbers, before it does it. No torch.

`plan` says what will run; `on_hardware` what it needs: memory by part, work, hours, cost, and what to change if it does
not fit.
"""

from salsa.planner.hardware import hardware_of
from salsa.planner.outline import plan
from salsa.planner.table import on_hardware

__all__ = ["hardware_of", "on_hardware", "plan"]
