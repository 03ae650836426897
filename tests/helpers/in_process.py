"""Stands in for a pool of worker processes, and works in this one."""

import concurrent.futures


class InProcess:
    """As `concurrent.futures.ProcessPoolExecutor`; work is done when it is submitted."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def shutdown(self, **_):
        return None

    def submit(self, work, *arguments):
        future = concurrent.futures.Future()
        try:
            future.set_result(work(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future
