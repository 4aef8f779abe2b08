"""What a model costs on a device, before anything is loaded: `kvjax.estimate`, and the devices that it knows."""

from kvjax.planner.devices import DEVICES, Device, Rate, named
from kvjax.planner.estimates import Estimate, estimate
from kvjax.planner.measured import measured_device

__all__ = ["DEVICES", "Device", "Estimate", "Rate", "estimate", "measured_device", "named"]
