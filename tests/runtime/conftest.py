from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def wandb_starts_soon() -> Iterator[None]:
    """wandb looks every 10 ms rather than 200 for the port of its own process, which it starts for each tracker.

    A wandb without this name for `sleep` looks as it does.
    """
    from time import sleep

    from wandb.sdk.lib.service import service_port_file

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(service_port_file, "_SLEEP", lambda seconds: sleep(min(seconds, 0.01)), raising=False)
        yield
