"""What every process that works for another does first."""

import multiprocessing
import multiprocessing.connection
import os
import threading

import cv2


def start_worker() -> None:
    """One thread of OpenCV for each process, which ends with its parent."""
    cv2.setNumThreads(1)
    parent = multiprocessing.parent_process()

    def leave_with_parent():
        # A pool's queue never closes by itself when the parent is killed.
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()
