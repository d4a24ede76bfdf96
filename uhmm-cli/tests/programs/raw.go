// A program whose memory is managed by its own runtime, by raw system calls.
package main

// int one(void) { return 1; }
import "C"

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"sync"
	"syscall"
)

type node struct {
	left, right *node
	value       [6]uint64
}

func build(depth int, seed uint64) *node {
	n := &node{}
	for i := range n.value {
		seed = seed*6364136223846793005 + 1442695040888963407
		n.value[i] = seed
	}
	if depth > 0 {
		n.left, n.right = build(depth-1, seed), build(depth-1, seed+1)
	}
	return n
}

func (n *node) sum() uint64 {
	if n == nil {
		return 1
	}
	s := n.left.sum()*3 + n.right.sum()*5
	for _, v := range n.value {
		s ^= v
	}
	return s
}

func main() {
	var group sync.WaitGroup
	sums := make([]uint64, 4)
	for t := range sums {
		group.Add(1)
		go func(t int) {
			defer group.Done()
			for round := 0; round < 3; round++ {
				sums[t] += build(13, uint64(t*10+round)).sum()
			}
		}(t)
	}
	group.Wait()
	debug.FreeOSMemory()
	for i := 0; i < 200; i++ {
		piece, err := syscall.Mmap(-1, 0, 1<<16, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_ANON|syscall.MAP_PRIVATE)
		if err != nil {
			panic(err)
		}
		piece[i] = byte(i)
		if err := syscall.Mprotect(piece, syscall.PROT_READ); err != nil {
			panic(err)
		}
		sums[0] += uint64(piece[i])
		if err := syscall.Munmap(piece); err != nil {
			panic(err)
		}
	}
	runtime.GC()
	for _, sum := range sums {
		fmt.Println(sum)
	}
	out, err := exec.Command("sh", "-c", "echo a child; exit 3").CombinedOutput()
	fmt.Printf("%s%v\n", out, err)
	os.Exit(int(C.one()) + 6)
}
