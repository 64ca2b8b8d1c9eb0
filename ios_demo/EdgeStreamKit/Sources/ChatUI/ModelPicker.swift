#if canImport(SwiftUI)
    import ChatCore
    import SwiftUI
    import UniformTypeIdentifiers

    /// The models of the app, and the two ways by which they come: from Files, and from the hub.
    struct ModelPicker: View {
        let chat: ChatModel
        @Environment(\.dismiss) private var dismiss
        @State private var importsFile = false
        @State private var repository = ""
        @State private var files: [HubRepository.File] = []
        @State private var searchFailure: String?
        @State private var isSearching = false

        var body: some View {
            NavigationStack {
                List {
                    installed
                    if !chat.arriving.isEmpty {
                        arriving
                    }
                    hub
                }
                .navigationTitle(localized("models.title"))
                .toolbar {
                    ToolbarItem(placement: .cancellationAction) {
                        Button(localized("models.done")) { dismiss() }
                    }
                    ToolbarItem(placement: .primaryAction) {
                        Button(localized("models.import"), systemImage: "square.and.arrow.down") { importsFile = true }
                    }
                }
                .fileImporter(isPresented: $importsFile, allowedContentTypes: [.folder, .data]) { result in
                    switch result {
                    case .success(let url): Task { await add(url) }
                    case .failure(let error): chat.fail(error)
                    }
                }
            }
        }

        private var installed: some View {
            Section(localized("models.installed")) {
                if chat.models.isEmpty {
                    Text(localized("models.none")).foregroundStyle(.secondary)
                }
                ForEach(chat.models) { entry in
                    Button {
                        dismiss()
                        Task { await chat.open(entry) }
                    } label: {
                        VStack(alignment: .leading) {
                            Text(entry.manifest.name)
                            Text(entry.manifest.bytes.formatted(.byteCount(style: .file)))
                                .font(.caption)
                                .foregroundStyle(.secondary)
                        }
                    }
                    .accessibilityAddTraits(entry == chat.current ? .isSelected : [])
                }
                .onDelete { indices in
                    let entries = indices.map { chat.models[$0] }
                    Task {
                        for entry in entries { await chat.remove(entry) }
                    }
                }
            }
        }

        private var arriving: some View {
            Section(localized("models.arriving")) {
                ForEach(chat.arriving.sorted { $0.key < $1.key }, id: \.key) { name, share in
                    ProgressView(value: share) { Text(name) }
                }
            }
        }

        private var hub: some View {
            Section(localized("models.hub")) {
                TextField(localized("models.repository"), text: $repository)
                    .autocorrectionDisabled()
                    #if os(iOS)
                        .textInputAutocapitalization(.never)
                        .keyboardType(.URL)
                    #endif
                    .onSubmit { search() }
                ForEach(repository.isEmpty ? HubRepository.suggested : [], id: \.self) { name in
                    Button(name) {
                        repository = name
                        search()
                    }
                }
                Button(localized("models.search")) { search() }
                    .disabled(HubRepository(repository) == nil || isSearching)
                if let searchFailure {
                    Text(searchFailure).foregroundStyle(.red)
                }
                ForEach(files) { file in
                    Button {
                        Task { await chat.download(file) }
                    } label: {
                        LabeledContent(file.path, value: file.manifest.bytes.formatted(.byteCount(style: .file)))
                    }
                    .accessibilityHint(localized("models.download"))
                }
            }
        }

        private func search() {
            guard let found = HubRepository(repository) else { return }
            isSearching = true
            Task {
                defer { isSearching = false }
                do {
                    files = try await chat.files(of: found)
                    searchFailure = files.isEmpty ? localized("models.noFiles") : nil
                } catch {
                    files = []
                    searchFailure = error.localizedDescription
                }
            }
        }

        /// A file of another app may be read only while access to it is claimed.
        private func add(_ url: URL) async {
            let isScoped = url.startAccessingSecurityScopedResource()
            defer {
                if isScoped { url.stopAccessingSecurityScopedResource() }
            }
            await chat.add(url)
        }
    }
#endif
