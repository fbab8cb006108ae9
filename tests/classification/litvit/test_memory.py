"""Memory that the C library keeps."""

import platform

import pytest


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that gives memory back")
def test_a_cpus_memory_is_kept_in_all_threads_unless_the_environment_has_settings_of_its_own(run_code):
    code = """
import resource, threading
import torch
from litvit.memory import keep_freed_memory

def count_new_pages():
    for step in range(32):
        if step == 24:  # the heap may grow at first: what is freed may be some bytes too small for its alignment
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(3 * 2**22)  # 48 MiB
    print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 8)

keep_freed_memory()
count_new_pages()
thread = threading.Thread(target=count_new_pages)
thread.start()
thread.join()
"""
    kept = run_code(code)[0].split()
    given_back = run_code(code, MALLOC_MMAP_MAX_="65536")[0].split()
    assert len(kept) == len(given_back) == 2
    for pages, before in zip(map(int, kept), map(int, given_back), strict=True):
        assert pages < 0.1 * before
