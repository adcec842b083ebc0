// The slash commands, as /help shows them.

export const HELP = `\
/temperature [0 to 2]    show or set how freely it draws its words
/topk [0 to 200]         show or set among how many tokens it draws, 0 is all
/length [1 to 4096]      show or set the most tokens of a reply
/clear                   new conversation, as Ctrl+Shift+O
/help                    all commands and keys

Enter sends, Shift+Enter starts a new line,
Escape stops a reply or an edit, Up in the empty box edits your last message,
/ goes to the box.`;
