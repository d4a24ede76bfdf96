# Puts a guard over memory of which most is away, and takes it down again: the kernel would have
# dropped what was there, so this must be refused, or old bytes could come back.
import ctypes
import errno
import mmap
import time

SIZE = 32 << 20
INSTALL, REMOVE = 102, 103
memory = mmap.mmap(-1, SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
line = b"what was there before\n"
for at in range(0, SIZE, 4096):
    memory[at : at + len(line)] = line
# So long that most of it is away.
time.sleep(0.5)
libc = ctypes.CDLL(None, use_errno=True)
address = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(memory)))
size = ctypes.c_size_t(SIZE)
result = libc.madvise(address, size, INSTALL)
print(result, errno.errorcode.get(ctypes.get_errno()))
libc.madvise(address, size, REMOVE)
# Nobody has dropped anything, so all of it is there.
print(sum(memory[at : at + len(line)] == line for at in range(0, SIZE, 4096)) * 4096 == SIZE)
