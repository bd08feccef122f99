// kstatus and Argo CD's Lua, over JSON objects: one line in, one word out.
//
//	kstatus            what sigs.k8s.io/cli-utils computes, as helm 4 and Flux do
//	kstatus health.lua the script, run as Argo CD runs it (gopher-lua, obj is the object): "Healthy: message"
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"

	lua "github.com/yuin/gopher-lua"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/cli-utils/pkg/kstatus/status"
)

func main() {
	script := ""
	if len(os.Args) > 1 {
		data, err := os.ReadFile(os.Args[1])
		check(err)
		script = string(data)
	}
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, 16<<20)
	for lines.Scan() {
		var object map[string]any
		check(json.Unmarshal(lines.Bytes(), &object))
		if script == "" {
			found, err := status.Compute(&unstructured.Unstructured{Object: integers(object).(map[string]any)})
			check(err)
			fmt.Println(found.Status)
		} else {
			fmt.Println(health(script, object))
		}
	}
	check(lines.Err())
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// integers turns whole numbers into int64, as the API machinery decodes them.
func integers(value any) any {
	switch found := value.(type) {
	case float64:
		if found == float64(int64(found)) {
			return int64(found)
		}
	case []any:
		for i, item := range found {
			found[i] = integers(item)
		}
	case map[string]any:
		for name, item := range found {
			found[name] = integers(item)
		}
	}
	return value
}

// health runs the script with the libraries that Argo CD opens (util/lua/lua.go, without "os" in full).
func health(script string, object map[string]any) string {
	state := lua.NewState(lua.Options{SkipOpenLibs: true})
	defer state.Close()
	for name, open := range map[string]lua.LGFunction{
		lua.LoadLibName: lua.OpenPackage, lua.BaseLibName: lua.OpenBase, lua.TabLibName: lua.OpenTable,
		lua.StringLibName: lua.OpenString, lua.MathLibName: lua.OpenMath,
	} {
		check(state.CallByParam(lua.P{Fn: state.NewFunction(open), NRet: 0, Protect: true}, lua.LString(name)))
	}
	state.SetGlobal("obj", valueOf(state, object))
	check(state.DoString(script))
	found, ok := state.Get(-1).(*lua.LTable)
	if !ok {
		return "no table"
	}
	return fmt.Sprintf("%s: %s", found.RawGetString("status"), found.RawGetString("message"))
}

func valueOf(state *lua.LState, value any) lua.LValue {
	switch found := value.(type) {
	case bool:
		return lua.LBool(found)
	case float64:
		return lua.LNumber(found)
	case string:
		return lua.LString(found)
	case []any:
		table := state.CreateTable(len(found), 0)
		for _, item := range found {
			table.Append(valueOf(state, item))
		}
		return table
	case map[string]any:
		table := state.CreateTable(0, len(found))
		for name, item := range found {
			table.RawSetString(name, valueOf(state, item))
		}
		return table
	}
	return lua.LNil
}
