package client_test

import (
	"context"
	"fmt"
	"log"
	"sync"
	"time"

	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client"
)

// Many goroutines may ask at once: their calls share requests, and none gets what another got.
func ExampleClient_Serials() {
	c, err := client.Dial("unix:///run/nsalloc/server.sock")
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()

	var wg sync.WaitGroup
	for range 1000 {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			defer cancel()
			got, err := c.Serials(ctx, 8)
			if err != nil {
				log.Print(err) // the cause, and what to do
				return
			}
			for serial := range got.All() {
				fmt.Println(serial)
			}
		})
	}
	wg.Wait()
}

// A program that may be killed between asking and learning keeps the request's id, and asks for the same
// serials again when it is back: within alloc.RequestLife any server of the pool answers the same.
func ExampleRetryID() {
	c, err := client.Dial("unix:///run/nsalloc/server.sock")
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()

	id := client.NewRequestID() // write it down before it is used
	var got alloc.Ranges
	err = client.RetryID(ctx, id, func(id string) error {
		got, err = c.Allocate(ctx, alloc.AllocateCommand{RequestID: id, Count: 8})
		return err
	})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(got)
}
