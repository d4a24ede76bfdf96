# Fills N blocks of 28 KiB, closes every descriptor but its output, as daemons do, and forks. Parent
# and child both read all of it.
import hashlib
import os
import sys
import time

n = int(sys.argv[1])
blocks = [bytes([i % 251]) * 4096 * 6 + b"%04096d" % i for i in range(n)]
# So long that most of it is away.
time.sleep(0.5)
os.closerange(3, 65536)


def digest():
    of = hashlib.sha256()
    for block in blocks:
        of.update(block)
    return of.hexdigest()


child = os.fork()
if child == 0:
    os.setsid()
    # Longer than a child is left alone.
    time.sleep(0.3)
    os._exit(7 if digest() == digest() else 1)
print(digest(), len(os.listdir("/proc/self/fd")))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
