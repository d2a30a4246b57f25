"""shared"""
from typing import Optional
def pick_model(name: Optional[str]) -> str:
    return name or "/work/shared/testbed/model"
