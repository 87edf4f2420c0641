"""Shared settings of the tests."""
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before its import: no test waits for a network


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes, not seconds; leave out by -m 'not slow'")
