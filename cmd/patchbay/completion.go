package main

import (
	"fmt"

	"github.com/urfave/cli/v2"
)

// The scripts ask the binary itself (--generate-bash-completion), so they never know less than it does.
const (
	bashCompletion = `_patchbay() {
  local cur words
  cur="${COMP_WORDS[COMP_CWORD]}"
  words=("${COMP_WORDS[@]:0:COMP_CWORD}")
  [[ "$cur" == -* ]] && words+=("$cur")
  COMPREPLY=($(compgen -W "$("${words[@]}" --generate-bash-completion 2>/dev/null)" -- "$cur"))
}
complete -o bashdefault -o default -F _patchbay patchbay
`
	zshCompletion = `#compdef patchbay
_patchbay() {
  local -a opts
  opts=("${(@f)$(${words[1,CURRENT-1]} ${words[CURRENT]:#[^-]*} --generate-bash-completion 2>/dev/null)}")
  _describe 'patchbay' opts
}
compdef _patchbay patchbay
`
	fishCompletion = `function __patchbay
  set -l words (commandline -opc)
  set -l cur (commandline -ct)
  string match -q -- '-*' $cur; and set words $words $cur
  $words --generate-bash-completion 2>/dev/null
end
complete -c patchbay -a '(__patchbay)'
`
)

func completionCommand() *cli.Command {
	scripts := map[string]string{"bash": bashCompletion, "zsh": zshCompletion, "fish": fishCompletion}
	return &cli.Command{
		Name:         "completion",
		Usage:        "print a shell's completion script",
		UsageText:    "patchbay completion bash|zsh|fish\n\nExample:\n   source <(patchbay completion bash)",
		OnUsageError: usageError,
		BashComplete: func(c *cli.Context) {
			fmt.Fprintln(c.App.Writer, "bash\nzsh\nfish")
		},
		Action: func(c *cli.Context) error {
			script, ok := scripts[c.Args().First()]
			if !ok || c.NArg() != 1 {
				return fmt.Errorf("completion: %q is not a shell it knows; use bash, zsh or fish", c.Args().First())
			}
			fmt.Fprint(c.App.Writer, script)
			return nil
		},
	}
}
