// Applies machine-config patches as talosctl does, by Talos's own package: a misspelt key, a wrong type or a document that this Talos does not know is refused.
//
//	go run . BASE PATCH…
package main

import (
	"fmt"
	"os"

	"github.com/siderolabs/talos/pkg/machinery/config/configloader"
	"github.com/siderolabs/talos/pkg/machinery/config/configpatcher"
)

func main() {
	base, err := os.ReadFile(os.Args[1])
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	failed := false
	for _, file := range os.Args[2:] {
		if err := apply(base, file); err != nil {
			fmt.Printf("%s: %v\n", file, err)
			failed = true
		}
	}
	if failed {
		os.Exit(1)
	}
}

func apply(base []byte, file string) error {
	patches, err := configpatcher.LoadPatches([]string{"@" + file})
	if err != nil {
		return err
	}
	patched, err := configpatcher.Apply(configpatcher.WithBytes(base), patches)
	if err != nil {
		return err
	}
	bytes, err := patched.Bytes()
	if err != nil {
		return err
	}
	_, err = configloader.NewFromBytes(bytes)
	return err
}
