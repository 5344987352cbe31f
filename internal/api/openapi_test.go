package api

import (
	"encoding"
	"net/http"
	"net/netip"
	"path"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"patchbay/internal/edge"
	"patchbay/internal/netns"
	"patchbay/internal/wire"
	"patchbay/tap"
)

// document is as much of OpenAPI 3.1 as the tests read.
type document struct {
	OpenAPI    string                          `yaml:"openapi"`
	Paths      map[string]map[string]yaml.Node `yaml:"paths"`
	Components struct {
		Parameters map[string]parameter
		Responses  map[string]struct {
			Description string
			Content     map[string]struct{ Schema schema }
		}
		Schemas map[string]schema
	}
}

type parameter struct {
	Ref  string `yaml:"$ref"`
	Name string
	In   string
}

type operation struct {
	OperationID string `yaml:"operationId"`
	Parameters  []parameter
	RequestBody *struct {
		Content map[string]struct{ Schema schema }
	} `yaml:"requestBody"`
	Responses map[string]struct {
		Ref     string `yaml:"$ref"`
		Content map[string]struct{ Schema schema }
	}
}

type schema struct {
	Ref        string `yaml:"$ref"`
	Type       string
	Enum       []string
	Items      *schema
	AllOf      []schema `yaml:"allOf"`
	Required   []string
	Properties map[string]schema
	Minimum    *int
	Maximum    *int
	MaxLength  *int `yaml:"maxLength"`
	MaxItems   *int `yaml:"maxItems"`
}

var readDocument = sync.OnceValues(func() (d document, err error) {
	err = yaml.Unmarshal(openAPI, &d)
	return d, err
})

func contract(t *testing.T) document {
	t.Helper()
	d, err := readDocument()
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// operations are the document's, by "METHOD pattern".
func (d document) operations(t *testing.T) map[string]operation {
	t.Helper()
	all := map[string]operation{}
	for pattern, item := range d.Paths {
		var shared []parameter
		if n, ok := item["parameters"]; ok {
			if err := n.Decode(&shared); err != nil {
				t.Fatal(err)
			}
		}
		for method, n := range item {
			if method == "parameters" {
				continue
			}
			var op operation
			if err := n.Decode(&op); err != nil {
				t.Fatalf("%s %s: %v", method, pattern, err)
			}
			op.Parameters = append(op.Parameters, shared...)
			for i, p := range op.Parameters {
				if name, ok := strings.CutPrefix(p.Ref, "#/components/parameters/"); ok {
					op.Parameters[i] = d.Components.Parameters[name]
				}
			}
			all[strings.ToUpper(method)+" "+pattern] = op
		}
	}
	return all
}

// TestRoutesAreDocumented holds the document and the route table together, both ways: routes, methods and parameters.
func TestRoutesAreDocumented(t *testing.T) {
	d := contract(t)
	if !strings.HasPrefix(d.OpenAPI, "3.1.") {
		t.Errorf("openapi: %q", d.OpenAPI)
	}
	ops := d.operations(t)
	ids := map[string]bool{}
	for _, r := range routes {
		key := r.method + " " + r.pattern
		op, ok := ops[key]
		if !ok {
			t.Errorf("%s is not in openapi.yaml", key)
			continue
		}
		delete(ops, key)
		if op.OperationID == "" || ids[op.OperationID] {
			t.Errorf("%s: operationId %q is empty, or there twice", key, op.OperationID)
		}
		ids[op.OperationID] = true
		var query, inPath []string
		for _, p := range op.Parameters {
			switch p.In {
			case "query":
				query = append(query, p.Name)
			case "path":
				inPath = append(inPath, p.Name)
			case "header":
			default:
				t.Errorf("%s: parameter %+v", key, p)
			}
		}
		slices.Sort(query)
		if want := slices.Sorted(slices.Values(r.query)); !slices.Equal(query, want) {
			t.Errorf("%s: openapi.yaml has the parameters %v, the route takes %v", key, query, want)
		}
		for _, p := range inPath {
			if !strings.Contains(r.pattern, "{"+p+"}") {
				t.Errorf("%s: openapi.yaml has a path parameter %q", key, p)
			}
		}
		if len(inPath) != strings.Count(r.pattern, "{") {
			t.Errorf("%s: openapi.yaml has the path parameters %v", key, inPath)
		}
	}
	for key := range ops {
		t.Errorf("openapi.yaml has %s, the server has not", key)
	}
}

// codes are all of them; TestCodes holds the list against the document.
var codes = []Code{CodeInvalid, CodeForbidden, CodeNotFound, CodeMethod, CodeConflict, CodeExhausted, CodeTooLarge, CodeUnavailable, CodeInternal}

// TestCodesAreDocumented: every code's status has a response that names it, and every failure of an operation is one of these responses.
func TestCodesAreDocumented(t *testing.T) {
	d := contract(t)
	byStatus := map[string]string{} // the component's name
	for name, op := range d.operations(t) {
		for status, r := range op.Responses {
			n, err := strconv.Atoi(status)
			if err != nil {
				t.Fatalf("%s: status %q", name, status)
			}
			ref, isRef := strings.CutPrefix(r.Ref, "#/components/responses/")
			switch {
			case n < 400 && isRef, n >= 400 && !isRef:
				t.Errorf("%s: %d has no answer of its own kind", name, n)
			case n >= 400 && byStatus[status] == "":
				byStatus[status] = ref
			case n >= 400 && byStatus[status] != ref:
				t.Errorf("%s: %d is %s here and %s elsewhere", name, n, ref, byStatus[status])
			}
		}
		if _, ok := op.Responses["403"]; !ok {
			t.Errorf("%s does not say that another user is refused", name)
		}
	}
	for _, c := range codes {
		if c == CodeMethod {
			continue // of no operation
		}
		status := strconv.Itoa(c.Status())
		r, ok := d.Components.Responses[byStatus[status]]
		if !ok {
			t.Errorf("no operation answers %s, which is %q", status, c)
			continue
		}
		if !strings.Contains(r.Description, string(c)+": ") {
			t.Errorf("the response for %s does not explain %q: %q", status, c, r.Description)
		}
		if s := r.Content["application/json"].Schema; s.Ref != "#/components/schemas/Refusal" {
			t.Errorf("the response for %s is %+v", status, s)
		}
	}
	for status := range byStatus {
		n, _ := strconv.Atoi(status)
		if !slices.ContainsFunc(codes, func(c Code) bool { return c.Status() == n }) {
			t.Errorf("openapi.yaml has status %s, which no code has", status)
		}
	}
}

// documentedTypes are the schemas that are a struct here.
var documentedTypes = map[string]reflect.Type{
	"Error": reflect.TypeFor[Error](), "Refusal": reflect.TypeFor[refusal](), "Info": reflect.TypeFor[Info](),
	"NetworkSpec": reflect.TypeFor[NetworkSpec](), "Network": reflect.TypeFor[Network](), "AttachmentSpec": reflect.TypeFor[AttachmentSpec](),
	"Attachment": reflect.TypeFor[Attachment](), "Port": reflect.TypeFor[Port](), "Flows": reflect.TypeFor[Flows](), "Publish": reflect.TypeFor[Publish](),
	"PublishSpec": reflect.TypeFor[PublishSpec](), "FDBEntry": reflect.TypeFor[FDBEntry](),
	"Peer": reflect.TypeFor[Peer](), "PeerSpec": reflect.TypeFor[PeerSpec](), "FDBSpec": reflect.TypeFor[FDBSpec](), "DropCount": reflect.TypeFor[DropCount](),
	"Plan": reflect.TypeFor[Plan](), "Interface": reflect.TypeFor[edge.Interface](), "Route": reflect.TypeFor[tap.Route](), "Device": reflect.TypeFor[Device](),
	"DeviceInfo": reflect.TypeFor[tap.Info](), "Identity": reflect.TypeFor[netns.Identity](), "Event": reflect.TypeFor[Event](),
}

// scalarTypes are those that are no struct, and what a string has to be.
var scalarTypes = map[string]struct {
	t    reflect.Type
	enum []string
}{
	"Name":      {reflect.TypeFor[string](), nil},
	"Prefix":    {reflect.TypeFor[netip.Prefix](), nil},
	"Addr":      {reflect.TypeFor[netip.Addr](), nil},
	"AddrPort":  {reflect.TypeFor[netip.AddrPort](), nil},
	"MAC":       {reflect.TypeFor[wire.MAC](), nil},
	"Time":      {reflect.TypeFor[time.Time](), nil},
	"Lifetime":  {reflect.TypeFor[Lifetime](), []string{string(LifetimeSession), string(LifetimeNamespace), string(LifetimeStream)}},
	"State":     {reflect.TypeFor[State](), []string{string(StateUp), string(StateLeaving), string(StateWaiting)}},
	"EventKind": {reflect.TypeFor[EventKind](), []string{string(EventUp), string(EventError), string(EventDetached)}},
	"Wire":      {reflect.TypeFor[Wire](), []string{string(WireVXLAN), string(WirePatchbay)}},
	"PeerState": {reflect.TypeFor[PeerState](), []string{string(PeerWaiting), string(PeerNew), string(PeerHeard), string(PeerHandshake), string(PeerUp), string(PeerDown)}},
	"Code":      {reflect.TypeFor[Code](), asStrings(codes)},
}

func asStrings[T ~string](l []T) (s []string) {
	for _, v := range l {
		s = append(s, string(v))
	}
	return s
}

// field is a property as encoding/json sees it.
type field struct {
	t        reflect.Type
	required bool
}

func fieldsOf(t reflect.Type) map[string]field {
	all := map[string]field{}
	for i := range t.NumField() {
		f := t.Field(i)
		tag := f.Tag.Get("json")
		name, opts, _ := strings.Cut(tag, ",")
		switch {
		case tag == "-":
		case f.Anonymous && tag == "":
			for n, g := range fieldsOf(f.Type) {
				all[n] = g
			}
		case name == "":
			all["no tag on "+f.Name] = field{t: f.Type}
		default:
			all[name] = field{f.Type, !strings.Contains(opts, "omit")}
		}
	}
	return all
}

// TestSchemas compares every schema with its Go type: properties both ways, what is required, and the type of each.
func TestSchemas(t *testing.T) {
	d := contract(t)
	for name := range d.Components.Schemas {
		if _, ok := documentedTypes[name]; ok {
			continue
		}
		sc, ok := scalarTypes[name]
		if !ok {
			t.Errorf("schema %s is no type of the API", name)
			continue
		}
		if got := d.Components.Schemas[name]; got.Type != "string" || !slices.Equal(got.Enum, sc.enum) {
			t.Errorf("schema %s: %s, enum %v; want string, enum %v", name, got.Type, got.Enum, sc.enum)
		}
	}
	for name, typ := range documentedTypes {
		s, ok := d.Components.Schemas[name]
		if !ok {
			t.Errorf("type %v has no schema %s", typ, name)
			continue
		}
		required := slices.Clone(s.Required)
		props := map[string]schema{}
		for _, part := range append(s.AllOf, s) {
			if part.Ref != "" {
				base := d.Components.Schemas[strings.TrimPrefix(part.Ref, "#/components/schemas/")]
				required = append(required, base.Required...)
				part = base
			}
			for n, p := range part.Properties {
				props[n] = p
			}
		}
		fields := fieldsOf(typ)
		for n, f := range fields {
			p, ok := props[n]
			if !ok {
				t.Errorf("schema %s has no %q", name, n)
				continue
			}
			if got := slices.Contains(required, n); got != f.required {
				t.Errorf("schema %s: %q is required: %v, want %v", name, n, got, f.required)
			}
			checkType(t, name+"."+n, p, f.t)
		}
		for n := range props {
			if _, ok := fields[n]; !ok {
				t.Errorf("schema %s has %q, the type %v has not", name, n, typ)
			}
		}
	}
}

func checkType(t *testing.T, what string, s schema, typ reflect.Type) {
	t.Helper()
	for typ.Kind() == reflect.Pointer {
		typ = typ.Elem()
	}
	if ref, ok := strings.CutPrefix(s.Ref, "#/components/schemas/"); ok {
		want := documentedTypes[ref]
		if want == nil {
			want = scalarTypes[ref].t
		}
		if want != typ {
			t.Errorf("%s is %s, want %v", what, ref, typ)
		}
		return
	}
	want := "string"
	switch {
	case typ.Implements(reflect.TypeFor[encoding.TextMarshaler]()), typ == reflect.TypeFor[[]byte]():
	case typ.Kind() == reflect.String:
	case typ.Kind() == reflect.Bool:
		want = "boolean"
	case typ.Kind() >= reflect.Int && typ.Kind() <= reflect.Uint64:
		want = "integer"
	case typ.Kind() == reflect.Float64:
		want = "number"
	case typ.Kind() == reflect.Slice:
		want = "array"
		if s.Items == nil {
			t.Errorf("%s: an array of what?", what)
			return
		}
		checkType(t, what+"[]", *s.Items, typ.Elem())
	default:
		want = "a reference to a schema"
	}
	if s.Type != want {
		t.Errorf("%s is %q, want %s for %v", what, s.Type, want, typ)
	}
}

// TestBounds: the bounds that the document promises are those of Validate.
func TestBounds(t *testing.T) {
	d := contract(t)
	n, a := d.Components.Schemas["NetworkSpec"].Properties, d.Components.Schemas["AttachmentSpec"].Properties
	p := d.Components.Schemas["PeerSpec"].Properties
	for what, c := range map[string]struct {
		got  *int
		want int
	}{
		"mtu min": {n["mtu"].Minimum, MinMTU}, "mtu max": {n["mtu"].Maximum, MaxMTU}, "vni max": {n["vni"].Maximum, MaxVNI}, "dns": {n["dns"].MaxItems, maxResolvers},
		"fdb": {p["fdb"].MaxItems, MaxPeerFDB}, "host": {p["host"].MaxLength, maxHost},
		"aliases": {a["aliases"].MaxItems, maxAliases}, "publish": {a["publish"].MaxItems, maxPublishes}, "queues": {a["queues"].Maximum, MaxQueues},
		"ifname": {a["ifname"].MaxLength, MaxIfName}, "stream": {a["stream"].MaxLength, maxSocket}, "hostname": {a["hostname"].MaxLength, maxHostname},
	} {
		if c.got == nil || *c.got != c.want {
			t.Errorf("%s: openapi.yaml says %v, the code %d", what, c.got, c.want)
		}
	}
}

// documented fails the test when the document does not know that the operation answers so.
func documented(t *testing.T, s *Server, r *http.Request, status int) {
	t.Helper()
	_, pattern := s.mux.Handler(r)
	if path.Clean(r.URL.Path) != r.URL.Path || pattern == "" || !strings.HasPrefix(pattern, r.Method+" ") {
		return // no route's
	}
	op := contract(t).operations(t)[pattern]
	if _, ok := op.Responses[strconv.Itoa(status)]; !ok {
		t.Errorf("%s answered %d, which openapi.yaml does not know", pattern, status)
	}
}
