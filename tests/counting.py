"""What every test script counts with: check(), and the line that it ends with."""

import sys
import threading

passed = failed = 0
_lock = threading.Lock()


def check(ok, name, detail=""):
    """Counts, and says what failed (the first hundred times). Returns ok."""
    global passed, failed
    with _lock:
        if ok:
            passed += 1
        else:
            failed += 1
            if failed <= 100:
                print(f"FAILED {name}" + (f": {detail}" if detail else ""), flush=True)
    return bool(ok)


def finish():
    print(f"{passed} passed, {failed} failed")
    sys.exit(failed != 0 or passed == 0)
