package main

import (
	"runtime"

	"github.com/spf13/cobra"
)

func (c *cli) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "version",
		Short:   "Print the version of this command",
		Example: "  nsalloc version -o json",
		Args:    usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.print(answer{
				doc: struct {
					Version string `json:"version"`
					Go      string `json:"go"`
				}{version, runtime.Version()},
				names: []string{version},
				lines: "nsalloc " + version + " (" + runtime.Version() + ")\n",
			})
		},
	}
}
